"""Tensors on a pretended GPU, and what becomes of operations on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from tests.support.pretended_gpus.streams import Allocation, Host, Stream, spoil

aten = torch.ops.aten
CPU = torch.device("cpu")
# torch would choose its kernel for a GPU; the CPU's is as good.
_WHOLE = {aten.scaled_dot_product_attention.default}
# Their results' sizes depend on data, or the host takes the data itself.
_WAITING = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
}
_ASSIGNING = {aten.index_put.default, aten.index_put_.default}
_INDEXING = {aten.index.Tensor, *_ASSIGNING}
_EMPTY = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
_PINNING = {aten.pin_memory.default, aten._pin_memory.default}


class DeviceTensor(torch.Tensor):
    """Of memory that the host may only see through copies.

    torch is built for CPUs here and takes it for one on "meta", of which it knows that nothing
    can be read.
    """

    memory: Tensor
    allocation: Allocation
    _gpus: Gpus
    _device: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, memory: Tensor, gpus: Gpus, device: torch.device) -> DeviceTensor:
        """`memory` on the CPU."""
        tensor: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.size(),
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=torch.device("meta"),
        )
        tensor.memory, tensor._gpus, tensor._device = memory, gpus, device
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """From other threads than the one that has installed the GPUs."""
        ours = next(x for x in tree_flatten((args, kwargs))[0] if isinstance(x, DeviceTensor))
        return ours._gpus.dispatch(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def record_stream(self, stream: Any) -> None:
        """See Tensor.record_stream."""
        self.allocation.record(stream)

    def tolist(self) -> Any:
        """See Tensor.tolist."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """See Tensor.numpy."""
        raise TypeError("can't convert a CUDA tensor to numpy")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, {self.device})"


class Gpus(TorchDispatchMode):
    """Enqueues what is asked of their tensors.

    Attributes:
        count: of GPUs.
        index: of the current one.
        num_waits: of the host.
        on_wait: torch.cuda.set_sync_debug_mode, "default", "warn" or "error".
        host: that asks them.
        streams: of all of them, at first the one of each.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.index = 0
        self.num_waits = 0
        self.on_wait = "default"
        self.host = Host()
        self.streams = [Stream(index, self.host) for index in range(count)]
        self._current = list(self.streams)
        self._pinned: dict[int, object] = {}  # storages by address, which is not given again
        self._taken_apart: list[torch.device] = []

    def device_of(self, device: Any = None) -> torch.device:
        """With its index, as torch has it."""
        if device is None or isinstance(device, int):
            return torch.device("cuda", self.index if device is None else device)
        device = torch.device(device)
        return torch.device("cuda", self.index) if device.index is None else device

    def stream_of(self, device: Any = None) -> Stream:
        """The current one of `device`."""
        return self._current[self.device_of(device).index]

    def new_stream(self, device: Any = None) -> Stream:
        """Another one."""
        self.streams.append(Stream(self.device_of(device).index, self.host))
        return self.streams[-1]

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        """`stream` is its device's current one, and its device the current one."""
        before, index = self._current[stream.index], self.index
        self._current[stream.index], self.index = stream, stream.index
        try:
            yield
        finally:
            self._current[stream.index], self.index = before, index

    def synchronize(self, device: Any = None) -> None:
        """Do everything that a device, or all, were given."""
        for stream in self.streams:
            if device is None or stream.device == self.device_of(device):
                stream.synchronize()

    def wait(self, device: torch.device) -> None:
        """The host waits for what the current stream was given."""
        stream = self.stream_of(device)
        if stream.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.num_waits += 1
        if self.on_wait == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.on_wait == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        stream.synchronize()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation of torch, on the CPU, on a GPU or from one to another."""
        if func is aten.scalar_tensor.default and not self._taken_apart:
            kwargs = {**kwargs, "device": CPU}  # a number that is assigned; it goes anywhere
        args, kwargs = tree_map_only(torch.device, self._named, (args, kwargs))
        flat, _ = tree_flatten((args, kwargs))
        ours = [x for x in flat if isinstance(x, DeviceTensor)]
        wanted = next((x for x in flat if isinstance(x, torch.device)), None)
        if not ours and (wanted is None or wanted.type != "cuda"):
            return self._on_cpu(func, args, kwargs)
        device = ours[0].device if ours else wanted
        assert device is not None
        whole = self._apart(func, args, kwargs, device)
        if whole is not NotImplemented:
            return whole
        if func is aten._to_copy.default:
            return self._to_copy(*args, **kwargs)
        if func is aten.copy_.default:
            return self.copy(*args, **kwargs)
        if func is aten.is_pinned.default:
            return False
        return self._on_gpu(func, args, kwargs, _common_device(func, flat, wanted))

    def _named(self, device: torch.device) -> torch.device:
        """As torch means it."""
        if device.type == "meta" and self._taken_apart:
            return self._taken_apart[-1]  # torch has asked a tensor of ours for its device
        return self.device_of(device) if device.type == "cuda" else device

    def _apart(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        """What torch itself takes `func` for on a GPU; NotImplemented where it is one kernel."""
        if func in _WHOLE:
            return NotImplemented
        self._taken_apart.append(device)
        try:
            with self:
                return func.decompose(*args, **kwargs)
        finally:
            self._taken_apart.pop()

    def _on_cpu(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if func in _PINNING:
            return self._pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _on_gpu(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        stream = self.stream_of(device)
        if func in _ASSIGNING and not isinstance(args[2], DeviceTensor):
            self.wait(device)  # torch copies the number there, from memory that is not pinned
        if func in _WAITING or (func in _INDEXING and _is_masked(args[1])):
            self.wait(device)
        elif written := _written(func, args, kwargs):
            args, kwargs = bare((args, kwargs))
            stream.enqueue(lambda: func(*args, **kwargs))
            return written[0] if len(written) == 1 else tuple(written)
        elif not _is_view(func):
            results = self._compute(func, bare((args, kwargs)), stream)
            return self._wrap(results, device)
        is_inference = args[0].is_inference() if args else torch.is_inference_mode_enabled()
        bare_args, bare_kwargs = bare((args, kwargs))
        results = func(*bare_args, **bare_kwargs)
        flat, _ = tree_flatten((args, kwargs))
        base = next((x for x in flat if isinstance(x, DeviceTensor)), None)
        with torch.inference_mode(is_inference):  # views are what their base is
            return self._wrap(results, device, base)

    def _wrap(self, results: Any, device: torch.device, base: DeviceTensor | None = None) -> Any:
        """`base`: what they are views of, if of anything."""

        def wrap(memory: Tensor) -> DeviceTensor:
            tensor = DeviceTensor(memory, self, device)
            stream = self.stream_of(device)
            tensor.allocation = Allocation(memory, stream) if base is None else base.allocation
            return tensor

        return tree_map_only(Tensor, wrap, results)

    def _compute(self, func: Any, arguments: Any, stream: Stream) -> Any:
        """New memory at once, and what is to be in it later."""
        args, kwargs = arguments
        blank, options = tree_map_only(Tensor, _blank, (args, kwargs))
        if "device" in options:
            options["device"] = torch.device("meta")
        results = tree_map_only(Tensor, _memory_like, func(*blank, **options))
        memories, _ = tree_flatten(results)
        if stream.capturing is not None:
            stream.capturing.results += memories

        def work() -> None:
            for memory, result in zip(
                memories, tree_flatten(func(*args, **kwargs))[0], strict=True
            ):
                memory.copy_(result)

        if func not in _EMPTY:
            stream.enqueue(work)
        return results

    def _to_copy(
        self,
        source: Tensor,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        non_blocking: bool = False,
        **_: object,
    ) -> Tensor:
        device, dtype = device or source.device, dtype or source.dtype
        with self:
            if device.type == "cuda":
                target = torch.empty_like(source, dtype=dtype, device=device)
            else:
                target = torch.empty(source.shape, dtype=dtype, pin_memory=non_blocking)
                spoil(target)
        return self.copy(target, source, non_blocking)

    def copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Tensor.copy_."""
        if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
            self._copy_between(target, source)
            return target
        ours = target if isinstance(target, DeviceTensor) else source
        is_late = non_blocking and self._is_pinned(source if ours is target else target)
        if not is_late and ours is target:
            source = source.clone()
        to, what = bare((target, source))
        self.stream_of(ours.device).enqueue(lambda: to.copy_(what))
        if not (is_late or (non_blocking and ours is target)):
            self.wait(ours.device)
        return target

    def _copy_between(self, target: DeviceTensor, source: DeviceTensor) -> None:
        """The source's stream copies, once the target's has come here, and that goes on then.

        Where it is the first one of its device, which CUDA calls NULL, all streams of both do so.
        """
        to, what = target.memory, source.memory
        first, second = self.stream_of(source.device), self.stream_of(target.device)
        others = [second] if first is not second else []
        if source.device != target.device and first is self.streams[source.device.index or 0]:
            devices = (source.device, target.device)
            others = [s for s in self.streams if s.device in devices and s is not first]
        for stream in others:
            first.wait_stream(stream)
        first.enqueue(lambda: to.copy_(what))
        for stream in others:
            stream.wait_stream(first)


def bare(arguments: Any) -> Any:
    """The memory behind tensors, and the CPU for devices."""
    flat, spec = tree_flatten(arguments)
    return tree_unflatten([_bare(x) for x in flat], spec)


def _bare(argument: Any) -> Any:
    if isinstance(argument, DeviceTensor):
        return argument.memory
    return CPU if isinstance(argument, torch.device) else argument


def _common_device(func: Any, flat: list[Any], wanted: torch.device | None) -> torch.device:
    """The one that is asked for, or that all tensors are on, numbers apart."""
    tensors = [x for x in flat if isinstance(x, Tensor)]
    devices = {t.device for t in tensors if t.device.type != "cpu" or t.dim()}
    if wanted is None and len(devices) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device: {devices}")
    return wanted or devices.pop()


def _is_masked(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that `func` changes and returns."""
    schema = func._schema.arguments
    names = [(i, a.name) for i, a in enumerate(schema) if a.alias_info and a.alias_info.is_write]
    return [args[i] if i < len(args) else kwargs[name] for i, name in names]


def _is_view(func: Any) -> bool:
    return any(result.alias_info for result in func._schema.returns)


def _blank(tensor: Tensor) -> Tensor:
    """Of its size, without memory: what comes of it has the size of what comes of `tensor`."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _memory_like(blank: Tensor) -> Tensor:
    memory = torch.empty_strided(blank.size(), blank.stride(), dtype=blank.dtype)
    spoil(memory)
    return memory

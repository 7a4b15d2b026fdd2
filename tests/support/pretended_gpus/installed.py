"""torch.cuda, and Triton's launches, for as long as the pretence lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import GridExecutor

from server.runner import attention
from tests.support.pretended_gpus.streams import Event, Graph, Stream, captured_in
from tests.support.pretended_gpus.tensors import DeviceTensor, Gpus, bare

_FREE_BYTES = 1 << 30
# Few, so that kernels split long texts among fewer programs: they are interpreted one by one.
_PROPERTIES = SimpleNamespace(name="pretended", multi_processor_count=4, total_memory=_FREE_BYTES)


@contextmanager
def pretended_gpus(count: int = 2) -> Iterator[Gpus]:
    """`count` of them, for this thread, in inference mode: autograd would go before all this."""
    gpus = Gpus(count)
    patches = [mock.patch.object(torch.cuda, name, fake) for name, fake in _cuda(gpus).items()]
    patches += [mock.patch.object(torch.Tensor, "to", _to(gpus))]
    _device_constructors()  # it remembers torch.tensor as it finds it the first time
    patches += [mock.patch.object(torch, "tensor", _tensor())]
    patches += [mock.patch.object(GridExecutor, "__call__", _launch(gpus))]
    patches += [mock.patch.object(attention, "causal_lower_right", _lower_right(gpus))]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(torch.inference_mode())
        stack.enter_context(gpus)
        yield gpus


def _cuda(gpus: Gpus) -> dict[str, object]:
    """Of torch.cuda, what the project and torch itself call."""

    def event(enable_timing: bool = False) -> Event:
        return _CurrentEvent(gpus, enable_timing)

    def set_sync_debug_mode(mode: str) -> None:
        gpus.on_wait = mode

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: gpus.count,
        "current_device": lambda: gpus.index,
        "get_device_properties": lambda device=None: _PROPERTIES,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (_FREE_BYTES, _FREE_BYTES),
        "empty_cache": lambda: None,
        "set_sync_debug_mode": set_sync_debug_mode,
        "synchronize": gpus.synchronize,
        "current_stream": gpus.stream_of,
        "device": lambda device: gpus.using(gpus.stream_of(device)),
        "stream": lambda stream: nullcontext() if stream is None else gpus.using(stream),
        "Stream": gpus.new_stream,
        "Event": event,
        **_graphs(gpus),
    }


class _CurrentEvent(Event):
    def __init__(self, gpus: Gpus, enable_timing: bool) -> None:
        super().__init__(enable_timing)
        self._gpus = gpus

    def record(self, stream: Stream | None = None) -> None:
        super().record(stream or self._gpus.stream_of())


def _graphs(gpus: Gpus) -> dict[str, object]:
    pools: list[list[Graph]] = []

    def new_pool() -> tuple[int, int]:
        pools.append([])
        return len(pools) - 1, 0

    class CUDAGraph(Graph):
        def replay(self) -> None:
            self.replay_in(gpus.stream_of(self.device))

    @contextmanager
    def graph(
        captured: Graph, pool: tuple[int, int], stream: Stream, capture_error_mode: str
    ) -> Iterator[None]:
        gpus.synchronize()
        captured.pool = pools[pool[0]]
        captured.pool.append(captured)
        captured.device = stream.device
        with gpus.using(stream), captured_in(captured, stream):
            yield

    return {"graph_pool_handle": new_pool, "CUDAGraph": CUDAGraph, "graph": graph}


def _to(gpus: Gpus) -> Callable[..., Any]:
    """Tensor.to, where torch would ask the driver which GPU "cuda" is."""
    plain = torch.Tensor.to

    def named(argument: Any) -> Any:
        if isinstance(argument, str | torch.device) and torch.device(argument).type == "cuda":
            return gpus.device_of(argument)
        return argument

    def to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(tensor, *map(named, args), **{k: named(v) for k, v in kwargs.items()})

    return to


def _tensor() -> Callable[..., Any]:
    """torch.tensor, which copies to GPUs where no dispatch mode sees it."""
    plain = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Any:
        made = plain(data, **options)
        return made if device is None else made.to(device)

    return tensor


def _lower_right(gpus: Gpus) -> Callable[[int, int], torch.Tensor]:
    """Written out: torch's own is a kind of tensor of its own, which no dispatch mode sees made."""

    def lower_right(num_queries: int, num_keys: int) -> torch.Tensor:
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=gpus.device_of())
        return seen.tril(num_keys - num_queries)

    return lower_right


def _launch(gpus: Gpus) -> Callable[..., Any]:
    """A kernel's launch, on the current GPU as Triton does it."""
    plain = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        flat, _ = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        if not any(isinstance(x, DeviceTensor) for x in tensors):
            return plain(executor, *args, **kwargs)
        if {tensor.device for tensor in tensors} != {gpus.device_of()}:
            raise RuntimeError(f"a kernel on {gpus.device_of()} cannot reach all its tensors")
        there, options = bare((args, kwargs))
        gpus.stream_of().enqueue(lambda: plain(executor, *there, **options))
        return None

    return launch

"""All layers of a Llama-shaped model as one program of the CPU's kernels.

Every kernel is the one that a layer run operation by operation would call, so that states are the
same to the last bit; what is saved is the way from Python to each of them and back, a quarter of a
small model's forward over one token. Imported only where the kernels can run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

import torch
from torch import Tensor

from server.cache.kv_store import KVStore
from server.runner import simd_attention
from server.runner.attention import PagedAttention
from server.runner.operations import Heads, LayerParts
from server.runner.plan import ForwardPlan
from server.runner.simd_linear import SimdLinear
from server.runner.simd_operations import SimdNorm, SimdRotation, add_gate
from server.runner.style import Style
from server.simd import vectors
from server.simd.attention import attending, scratch_bytes, writer
from server.simd.compiled import compiled
from server.simd.functions import UNIT, copy
from server.simd.kernel import Kernel, part
from server.simd.program import Later, Program
from server.simd.vectors import LANES, load_whole

# What differs from forward to forward: numbers of rows and groups, and addresses.
_ROWS, _KEPT = Later("rows"), Later("kept")  # kept: of which something is returned
_IDS, _POSITIONS, _SLOTS = (
    Later("ids"),
    Later("positions"),
    Later("slots"),
)  # [rows], see ForwardPlan
_KEEP = Later("keep")  # [kept], see ForwardPlan
_COSINES, _SINES = Later("cosines"), Later("sines")  # float32 [positions, dim]: of all positions
_GROUPS, _NUM_GROUPS = Later("groups"), Later("num_groups")  # see simd_attention.describe
_SCRATCH, _SCRATCH_SIZE = Later("scratch"), Later("scratch_size")  # of attention
_OUTPUT = Later("output")  # [kept, what is returned of a row]
# And addresses of rows that kernels leave to each other, sized by `_make_room`. What is not float32
# is of the model's type, as products and attention take it.
_X = Later("x")  # float32 [rows, hidden]: states
_COS, _SIN = Later("cos"), Later("sin")  # float32 [rows, dim]: of each row's position
_NORMED = Later("normed")  # [rows, hidden]
_HEADS = Later("heads")  # float32 [rows, queries, keys and values]
_ROTATED = Later("rotated")  # the same, rotated, where that is not done in place
_ATTENDED = Later("attended")  # [rows, heads * dim]: what attention found
_ADDED = Later("added")  # float32 [rows, hidden]: what the next norm adds to the states
_GATE_UP = Later("gate_up")  # float32 [rows, both inputs of the gate]
_GATED = Later("gated")  # [rows, what `down` takes]
# In the last layer, and behind it.
_KEPT_X, _KEPT_ATTENDED = Later("kept_x"), Later("kept_attended")
_KEPT_NORMED = Later("kept_normed")
_LEAST_POSITIONS = 1024  # of which cosines and sines are kept
# What they are worked out by would take as much again of all at once.
_POSITIONS_IN_ONE_PIECE = 4096


@dataclass(frozen=True, slots=True)
class Layer:
    """LayerParts that are all of kernels."""

    attention_norm: SimdNorm
    qkv: SimdLinear
    rotation: SimdRotation
    style: Style
    out: SimdLinear
    mlp_norm: SimdNorm
    gate_up: SimdLinear
    down: SimdLinear

    @staticmethod
    def of(parts: LayerParts) -> Layer | None:
        """The same parts; None where one of them is not for kernels, or not for a program."""
        kinds = get_type_hints(Layer)
        given: dict[str, Any] = {name: getattr(parts, name) for name in kinds}
        if not all(isinstance(given[name], kind) for name, kind in kinds.items()):
            return None
        layer = Layer(**given)
        linears = (layer.qkv, layer.out, layer.gate_up, layer.down)
        heads = layer.rotation.heads
        fits = all(linear.is_full for linear in linears)
        fits &= layer.gate_up.out_features // 2 % LANES == 0
        fits &= heads.dim * heads.dtype.itemsize % UNIT == 0
        return layer if fits and simd_attention.attends(heads, layer.style) else None


class SimdLayers:
    """A model's forward; not thread-safe, as runners are not."""

    def __init__(
        self,
        layers: Sequence[Layer],
        norm: SimdNorm,
        dtype: torch.dtype,
        embedding: Tensor,
        rope: Callable[[Tensor], tuple[Tensor, Tensor]],
        head: SimdLinear | None,
    ) -> None:
        """Tokens go through `embedding`, `layers` in their order, `norm` and `head`.

        Args:
            layers: all of the model's.
            norm: behind them.
            dtype: the model's.
            embedding: [V, hidden_size] of any float type.
            rope: positions [N] -> cosines and signed sines, as `operations.Rotation` takes them.
            head: where it is one of kernels.
        """
        self._layers = layers
        self._norm = norm
        self._dtype = dtype
        self._embedding = embedding.contiguous()
        self._rope = rope
        self._head = head
        self._store: KVStore | None = None
        self._programs: dict[bool, Program] = {}  # by whether the head is part of it
        self._room = 0  # rows that the workspace holds
        self._workspace: dict[str, int] = {}
        self._buffers: dict[str, Tensor] = {}
        self._cosines = self._sines = torch.empty(0)

    def takes(self, attention: PagedAttention) -> bool:
        """Is `attention` by the kernels? It may have been exchanged."""
        return attention.short is simd_attention

    @property
    def has_head(self) -> bool:
        """May `logits` be asked for?"""
        return self._head is not None and self._head.is_full

    def states(self, plan: ForwardPlan, store: KVStore) -> Tensor:
        """[num_kept, hidden_size] of the model's type, normed; KV goes to the store."""
        size = self._embedding.shape[1]
        return self._run(plan, store, size, self._dtype, False)

    def logits(self, plan: ForwardPlan, store: KVStore) -> Tensor:
        """float32 [num_kept, rows of the head]; KV goes to the store."""
        assert self._head is not None
        return self._run(plan, store, self._head.out_features, torch.float32, True)

    def _run(
        self, plan: ForwardPlan, store: KVStore, size: int, dtype: torch.dtype, with_head: bool
    ) -> Tensor:
        """[num_kept, size]."""
        if store is not self._store:
            self._programs.clear()
            self._store = store
        if with_head not in self._programs:
            self._programs[with_head] = self._write_program(store, with_head)
        keep = plan.kept_rows()
        output = torch.empty(len(keep), size, dtype=dtype)
        self._make_room(plan.num_rows, plan.num_positions)
        groups = simd_attention.describe(plan.groups)
        scratch_size = self._scratch_size(plan)
        self._programs[with_head].run(
            rows=plan.num_rows,
            kept=len(keep),
            ids=plan.token_ids.data_ptr(),
            positions=plan.position_ids.data_ptr(),
            slots=plan.slots.data_ptr(),
            keep=keep.data_ptr(),
            groups=groups.ctypes.data,
            num_groups=len(plan.groups),
            scratch=self._buffer("scratch", torch.get_num_threads() * scratch_size),
            scratch_size=scratch_size,
            output=output.data_ptr(),
            **self._workspace,
        )
        return output

    def _scratch_size(self, plan: ForwardPlan) -> int:
        heads = self._layers[0].rotation.heads
        longest = max(group.num_tokens for group in plan.groups)
        return scratch_bytes(longest, heads.num_heads, heads.dim)

    def _make_room(self, num_rows: int, num_positions: int) -> None:
        """For what kernels leave to each other, and of positions what attention rotates by."""
        if num_positions > len(self._cosines):
            count = max(_LEAST_POSITIONS, 1 << (num_positions - 1).bit_length())
            pieces = map(self._rope, torch.arange(count).split(_POSITIONS_IN_ONE_PIECE))
            self._cosines, self._sines = map(torch.cat, zip(*pieces, strict=True))
            self._workspace["cosines"] = self._cosines.data_ptr()
            self._workspace["sines"] = self._sines.data_ptr()
        if num_rows <= self._room:
            return
        layer, item, size = self._layers[0], self._dtype.itemsize, self._embedding.shape[1]
        heads = layer.rotation.heads
        sizes = {
            "x": size * 4,
            "cos": heads.dim * 4,
            "sin": heads.dim * 4,
            "normed": size * item,
            "heads": layer.qkv.out_features * 4,
            "rotated": layer.qkv.out_features * item,
            "attended": heads.num_heads * heads.dim * item,
            "added": size * 4,
            "gate_up": layer.gate_up.out_features * 4,
            "gated": layer.gate_up.out_features // 2 * item,
            "kept_x": size * 4,
            "kept_attended": heads.num_heads * heads.dim * item,
            "kept_normed": size * item,
        }
        for name, num_bytes in sizes.items():
            self._workspace[name] = self._buffer(name, num_rows * num_bytes)
        self._room = num_rows

    def _buffer(self, name: str, num_bytes: int) -> int:
        """The address of so many bytes at least, the same as long as they are enough."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < num_bytes:
            buffer = torch.empty(1 << max(0, num_bytes - 1).bit_length(), dtype=torch.uint8)
            self._buffers[name] = buffer
        return buffer.data_ptr()

    def _write_program(self, store: KVStore, with_head: bool) -> Program:
        program = Program()
        self._add_beginning(program)
        for index, layer in enumerate(self._layers):
            layer.attention_norm.add_to(program, _X, _ADDED if index else None, _ROWS, _NORMED)
            layer.qkv.add_to(program, _NORMED, _ROWS, _HEADS)
            _add_attention(program, index, layer, store)
            if index < len(self._layers) - 1:
                self._add_outputs(program, layer, _X, _ATTENDED, _ROWS)
            else:
                # Of other rows than the kept ones, it has to leave keys and values only.
                _add_keeping(program, layer)
                self._add_outputs(program, layer, _KEPT_X, _KEPT_ATTENDED, _KEPT)
        normed = _KEPT_NORMED if with_head else _OUTPUT
        self._norm.add_to(program, _KEPT_X, _ADDED, _KEPT, normed)
        if with_head:
            assert self._head is not None
            self._head.add_to(program, normed, _KEPT, _OUTPUT)
        return program

    def _add_beginning(self, program: Program) -> None:
        """Look up what rows begin with, and what they are rotated by."""
        size = self._embedding.shape[1]
        program.add(
            _embedding(self._embedding.dtype),
            ids=_IDS,
            num_rows=_ROWS,
            size=size,
            table=self._embedding.data_ptr(),
            output=_X,
            waits=False,
        )
        row = self._layers[0].rotation.heads.dim * 4
        _add_choice(program, _COSINES, row, _COS, _POSITIONS, _ROWS)
        _add_choice(program, _SINES, row, _SIN, _POSITIONS, _ROWS)

    def _add_outputs(
        self, program: Program, layer: Layer, x: Later, attended: Later, rows: Later
    ) -> None:
        """What follows attention; what the MLP gives is left for the next norm to add to `x`."""
        layer.out.add_to(program, attended, rows, _ADDED)
        layer.mlp_norm.add_to(program, x, _ADDED, rows, _NORMED)
        layer.gate_up.add_to(program, _NORMED, rows, _GATE_UP)
        add_gate(program, _GATE_UP, rows, layer.down.in_features, self._dtype, _GATED)
        layer.down.add_to(program, _GATED, rows, _ADDED)


def _add_attention(program: Program, index: int, layer: Layer, store: KVStore) -> None:
    """Rotate, write to the store, attend."""
    heads = layer.rotation.heads
    item = heads.dtype.itemsize
    rotated = _HEADS if heads.dtype == torch.float32 else _ROTATED
    layer.rotation.add_to(program, _HEADS, _COS, _SIN, _ROWS, rotated)
    store.allocate(index, _empty(heads), _empty(heads))
    keys, values = store.slots(index)
    width = heads.num_kv_heads * heads.dim * item
    stride = (heads.num_heads + 2 * heads.num_kv_heads) * heads.dim * item
    first_key = heads.num_heads * heads.dim * item
    program.add(
        writer(),
        slots=_SLOTS,
        num_rows=_ROWS,
        keys=Later(rotated.name, first_key),
        key_stride=stride,
        stored_keys=keys.data_ptr(),
        key_size=width,
        values=Later(rotated.name, first_key + width),
        value_stride=stride,
        stored_values=values.data_ptr(),
        value_size=width,
    )
    program.add(
        attending(simd_attention.kind_of(heads)),
        queries=rotated,
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        output=_ATTENDED,
        scratch=_SCRATCH,
        scratch_size=_SCRATCH_SIZE,
        groups=_GROUPS,
        num_groups=_NUM_GROUPS,
        num_kv_heads=heads.num_kv_heads,
        query_stride=stride,
        page_size=store.page_size,
        window=layer.style.window,
        scale=layer.style.scale_for(heads.dim),
    )


def _empty(heads: Heads) -> Tensor:
    """What keys, or values, of one token look like."""
    return torch.empty(heads.num_kv_heads, heads.dim, dtype=heads.dtype)


def _add_keeping(program: Program, layer: Layer) -> None:
    """Copy states and attention of the rows that are kept."""
    heads = layer.rotation.heads
    _add_choice(program, _X, layer.out.out_features * 4, _KEPT_X, _KEEP, _KEPT)
    size = heads.num_heads * heads.dim * heads.dtype.itemsize
    _add_choice(program, _ATTENDED, size, _KEPT_ATTENDED, _KEEP, _KEPT)


def _add_choice(
    program: Program, source: Later, size: int, target: Later, chosen: Later, num_rows: Later
) -> None:
    """The `chosen` ones of rows of `size` bytes."""
    program.add(
        _choosing(), source=source, target=target, chosen=chosen, num_rows=num_rows, size=size
    )


@cache
def _choosing() -> Kernel:
    @compiled
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        first, end = part(a.num_rows, thread, num_threads)
        for row in range(first, end):
            chosen = load_whole(a.chosen + row * 8)
            copy(a.source + chosen * a.size, a.target + row * a.size, a.size)

    return Kernel(body, dict.fromkeys(("source", "target", "chosen", "num_rows", "size"), "q"))


@cache
def _embedding(dtype: torch.dtype) -> Kernel:
    """Rows of a table as float32."""
    bits, num_bytes = 16 if dtype == torch.bfloat16 else 32, dtype.itemsize
    is_half = dtype == torch.float16

    @compiled
    def load(address: Any) -> Any:
        return vectors.load_half(address, LANES) if is_half else vectors.load(address, LANES, bits)

    @compiled
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        first, end = part(a.num_rows, thread, num_threads)
        for row in range(first, end):
            source = a.table + load_whole(a.ids + row * 8) * a.size * num_bytes
            target = a.output + row * a.size * 4
            for column in range(0, a.size, LANES):
                vectors.store(target + column * 4, load(source + column * num_bytes), 32)

    return Kernel(body, dict.fromkeys(("ids", "num_rows", "size", "table", "output"), "q"))

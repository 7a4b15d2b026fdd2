"""Attention of short queries over long paged KV on a GPU, written in Triton.

The module is a `ShortAttention`, its functions from `max_tokens` on are the methods. Imported only
where Triton is (see `attention_choice`). One program takes the query rows of one
span and one KV head, (token, head of the group), and a *split* of the keys; where sequences are
few, several splits of one span run side by side and a second kernel combines them. Keys are read
where they lie: nothing is gathered, and lengths are read on the device, so that a captured launch
serves sequences of any length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.cache.kv_store import KVStore
from server.runner.grouping import MAX_GROUPED_TOKENS
from server.runner.plan import Group
from server.runner.style import Style

# Query rows (tokens times heads of a group) of one program; more do not fit into its registers.
_MAX_ROWS = 128
# And their bytes, which with the tiles have to fit into the shared memory of small GPUs.
_MAX_QUERY_BYTES = 32 << 10
# tl.dot takes no side shorter than this.
_MIN_SIDE = 16
_MAX_SPLITS = 16
# Of a split.
_LEAST_KEYS = 128
# Programs that fill the machine, where it cannot be asked (the interpreter).
_DEFAULT_PROCESSORS = 132
# Bytes of a tile of keys in shared memory, beside one of values and the stages in flight.
_TILE_BYTES = 16 << 10
_NEVER = tl.constexpr(-1e30)


# Tables of captured graphs and of other steps differ in their strides' divisors, and their parts in
# where they begin, by the number of spans; they would be compiled for apart, while requests wait.
@triton.jit(
    do_not_specialize=["num_tokens", "table_stride", "splits"],
    do_not_specialize_on_alignment=["table", "starts", "lengths"],
)
def _attend_split(
    queries,
    keys,
    values,
    sinks,
    output,
    partial_output,
    partial_state,
    table,
    starts,
    lengths,
    scale,
    softcap,
    table_stride,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    num_tokens,
    splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One (span, KV head, split): softmax over its keys, kept as (sum, maximum, weight)."""
    span = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    # Positions of 64 bits take registers: 200 in place of 164 for 5 tokens of 4 heads of 128.
    start = tl.load(starts + span).to(tl.int32)
    length = tl.load(lengths + span).to(tl.int32)

    row = tl.arange(0, ROWS)
    token = row // HEADS
    head = kv_head * HEADS + row % HEADS
    is_row = token < num_tokens
    dim = tl.arange(0, DIM_PADDED)
    value_dim = tl.arange(0, VALUE_DIM_PADDED)
    query_row = (span * num_tokens + token).to(tl.int64)
    query = tl.load(
        queries + (query_row * query_stride + head * query_head_stride)[:, None] + dim[None, :],
        mask=is_row[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )
    # Padding tokens look at what the last real one looks at, never at nothing.
    position = tl.minimum(start + token, length - 1)

    first = 0
    if WINDOW > 0:
        first = tl.maximum(start - WINDOW + 1, 0)
    chunk = tl.cdiv(tl.cdiv(length - first, TILE), splits) * TILE
    begin = first + split * chunk
    end = tl.minimum(begin + chunk, length)

    maximum = tl.full([ROWS], _NEVER, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        # The first split alone sees the sink.
        sink = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32)
        maximum = tl.where(split == 0, sink, _NEVER)
        weight += tl.where(split == 0, 1.0, 0.0)
    total = tl.zeros([ROWS, VALUE_DIM_PADDED], tl.float32)
    for tile in range(begin, end, TILE):
        key = tile + tl.arange(0, TILE)
        is_key = key < end
        page = tl.load(table + span * table_stride + key // PAGE, mask=is_key, other=0)
        slot = page.to(tl.int64) * PAGE + key % PAGE
        k = tl.load(
            keys + (slot * key_stride + kv_head * key_head_stride)[None, :] + dim[:, None],
            mask=is_key[None, :] & (dim < DIM)[:, None],
            other=0.0,
        )
        score = tl.dot(query, k, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        seen = is_key[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        score = tl.where(seen, score, _NEVER)
        larger = tl.maximum(maximum, tl.max(score, 1))
        fading = tl.exp(maximum - larger)
        share = tl.where(seen, tl.exp(score - larger[:, None]), 0.0)
        v = tl.load(
            values
            + (slot * value_stride + kv_head * value_head_stride)[:, None]
            + value_dim[None, :],
            mask=is_key[:, None] & (value_dim < VALUE_DIM)[None, :],
            other=0.0,
        )
        total = total * fading[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        weight = weight * fading + tl.sum(share, 1)
        maximum = larger

    is_value = is_row[:, None] & (value_dim < VALUE_DIM)[None, :]
    if IS_SPLIT:
        part = ((span * tl.num_programs(1) + kv_head) * splits + split).to(tl.int64) * ROWS + row
        tl.store(
            partial_output + (part * VALUE_DIM)[:, None] + value_dim[None, :], total, mask=is_value
        )
        tl.store(partial_state + part * 2, maximum, mask=is_row)
        tl.store(partial_state + part * 2 + 1, weight, mask=is_row)
    else:
        # The output is dense, [tokens, all heads, VALUE_DIM].
        out_row = query_row * (tl.num_programs(1) * HEADS) + head
        tl.store(
            output + (out_row * VALUE_DIM)[:, None] + value_dim[None, :],
            (total / weight[:, None]).to(output.dtype.element_ty),
            mask=is_value,
        )


@triton.jit(do_not_specialize=["num_tokens", "splits"])
def _combine_splits(
    partial_output,
    partial_state,
    output,
    num_tokens,
    splits,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """One (span, KV head, query row): the softmax over all keys from that of each split."""
    span = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    value_dim = tl.arange(0, VALUE_DIM_PADDED)
    is_value = value_dim < VALUE_DIM
    split = tl.arange(0, MAX_SPLITS)
    is_split = split < splits
    part = ((span * tl.num_programs(1) + kv_head).to(tl.int64) * splits + split) * ROWS + row
    maximum = tl.load(partial_state + part * 2, mask=is_split, other=_NEVER)
    weight = tl.load(partial_state + part * 2 + 1, mask=is_split, other=0.0)
    share = tl.exp(maximum - tl.max(maximum, 0))
    total = tl.load(
        partial_output + (part * VALUE_DIM)[:, None] + value_dim[None, :],
        mask=is_split[:, None] & is_value[None, :],
        other=0.0,
    )
    combined = tl.sum(total * share[:, None], 0) / tl.sum(weight * share, 0)
    query_row = (span * num_tokens + row // HEADS).to(tl.int64)
    out_row = query_row * (tl.num_programs(1) * HEADS) + kv_head * HEADS + row % HEADS
    tl.store(
        output + out_row * VALUE_DIM + value_dim,
        combined.to(output.dtype.element_ty),
        mask=is_value,
    )


def max_tokens(heads: int, dim: int, element_size: int) -> int:
    """Of a span: as many as one program takes for `heads` query heads of one KV head; 0: none."""
    rows = min(_MAX_ROWS, _MAX_QUERY_BYTES // (_padded(dim) * element_size))
    # Rows are padded to a power of two.
    return min(MAX_GROUPED_TOKENS, (1 << rows.bit_length() - 1) // heads)


def write(store: KVStore, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """By torch, which has no better way to."""
    store.write(layer, slots, keys, values)


def supports(group: Group, queries: Tensor, store: KVStore, layer: int, style: Style) -> bool:
    """May `attend_group` be called with this? It knows every style."""
    num_heads, dim = queries.shape[1:]
    heads = num_heads // store.slots(layer)[0].shape[1]
    longest = max_tokens(heads, dim, queries.element_size())
    return group.num_tokens <= longest


def attend_group(group: Group, queries: Tensor, store: KVStore, layer: int, style: Style) -> Tensor:
    """Queries [B * num_tokens, heads, d] of one group -> [B * num_tokens, heads, value dim].

    The group is one that `supports` accepts; the last dimension of queries, keys and values is
    dense. Nothing is read back to the host.
    """
    keys, values = store.slots(layer)
    num_heads, dim = queries.shape[1:]
    num_kv_heads, value_dim = values.shape[1:]
    heads = num_heads // num_kv_heads
    paging = group.paging()
    rows = max(_MIN_SIDE, triton.next_power_of_2(group.num_tokens * heads))
    longest = paging.table.shape[1] * store.page_size
    splits = num_splits(group.num_spans * num_kv_heads, longest, queries.device)
    output = queries.new_empty(len(queries), num_heads, value_dim)
    parts = (group.num_spans, num_kv_heads, splits, rows) if splits > 1 else (1, 1, 1, 1)
    partial_output = queries.new_empty(*parts, value_dim, dtype=torch.float32)
    partial_state = queries.new_empty(*parts, 2, dtype=torch.float32)
    shape = {
        "HEADS": heads,
        "VALUE_DIM": value_dim,
        "VALUE_DIM_PADDED": _padded(value_dim),
        "ROWS": rows,
    }
    _attend_split[(group.num_spans, num_kv_heads, splits)](
        queries,
        keys,
        values,
        queries if style.sinks is None else style.sinks,
        output,
        partial_output,
        partial_state,
        paging.table,
        paging.starts,
        paging.lengths,
        style.scale_for(dim),
        style.softcap or 0.0,
        paging.table.stride(0),
        queries.stride(0),
        queries.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        group.num_tokens,
        splits,
        DIM=dim,
        DIM_PADDED=_padded(dim),
        TILE=_tile(max(dim, value_dim), keys.element_size()),
        PAGE=store.page_size,
        IS_SPLIT=splits > 1,
        WINDOW=style.window,
        HAS_SOFTCAP=style.softcap is not None,
        HAS_SINKS=style.sinks is not None,
        num_warps=4,
        num_stages=2,
        **shape,
    )
    if splits > 1:
        _combine_splits[(group.num_spans, num_kv_heads, group.num_tokens * heads)](
            partial_output,
            partial_state,
            output,
            group.num_tokens,
            splits,
            MAX_SPLITS=_MAX_SPLITS,
            num_warps=1,
            **shape,
        )
    return output


def num_splits(programs: int, num_keys: int, device: torch.device) -> int:
    """Parts of a span's keys: enough to fill the machine twice, but none too small.

    `num_keys` is of the longest table. Any number: compiled is one code for one part, and one for
    several (see GraphRunner.warm_up).
    """
    processors = _DEFAULT_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // programs, num_keys // _LEAST_KEYS, _MAX_SPLITS))


def _padded(dim: int) -> int:
    padded: int = triton.next_power_of_2(dim)
    return max(_MIN_SIDE, padded)


def _tile(dim: int, element_size: int) -> int:
    """Keys of one step, a power of two from 16 to 64.

    Exact products of float32 take registers for each key: 64 keys and rows of 64 numbers spill
    5.8 KB a thread for compute capability 9.0, with 16 keys 24 bytes at most.
    """
    if element_size > 2:
        return _MIN_SIDE
    return max(_MIN_SIDE, min(64, _TILE_BYTES // (_padded(dim) * element_size)))

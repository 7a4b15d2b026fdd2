"""Attention over paged KV on a CPU, by the kernel of `server.simd.attention`.

The module is a `ShortAttention`, its functions are the methods. Imported only where the kernels can
run (see `attention_choice`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.cache.kv_store import KVStore
from server.runner.grouping import MAX_GROUPED_TOKENS
from server.runner.operations import Heads
from server.runner.plan import Group
from server.runner.style import Style
from server.simd.attention import CHUNK, Kind, attending, scratch_bytes, writer
from server.simd.functions import UNIT
from server.simd.support import BITS

# Of a head: what is worked with stays in registers, or nearly.
_MAX_DIM = 256
# Bytes of the largest working memory of a thread; more heads are left to torch.
_MAX_SCRATCH = 8 << 20


def max_tokens(heads: int, dim: int, element_size: int) -> int:
    """Of a span that is padded: as many as a plan groups, for any heads."""
    return MAX_GROUPED_TOKENS


def supports(group: Group, queries: Tensor, store: KVStore, layer: int, style: Style) -> bool:
    """May `attend_group` be called with this?"""
    keys, values = store.slots(layer)
    dims = keys.shape[-1], values.shape[-1]
    return queries.dtype == keys.dtype and _fits(queries.shape[1], *dims, keys.dtype, style)


def attends(heads: Heads, style: Style) -> bool:
    """May `attending` be asked for this?"""
    return _fits(heads.num_heads, heads.dim, heads.dim, heads.dtype, style)


def kind_of(heads: Heads) -> Kind:
    """The kernel for a layer that `attends`."""
    repeats = heads.num_heads // heads.num_kv_heads
    return Kind(heads.dim, heads.dim, repeats, BITS[heads.dtype])


def _fits(num_heads: int, dim: int, value_dim: int, dtype: torch.dtype, style: Style) -> bool:
    return (
        style.softcap is None
        and style.sinks is None
        and dtype in BITS
        and max(dim, value_dim) <= _MAX_DIM
        and scratch_bytes(CHUNK, num_heads, value_dim) <= _MAX_SCRATCH
    )


def write(store: KVStore, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """As KVStore.write, keys and values in one pass."""
    if not store.has(layer) or not all(
        _is_dense(given) and given.dtype == stored.dtype and given[0].nbytes % UNIT == 0
        for given, stored in zip((keys, values), store.slots(layer), strict=True)
    ):
        store.write(layer, slots, keys, values)
        return
    stored_keys, stored_values = store.slots(layer)
    writer().alone(
        slots.data_ptr(),
        len(slots),
        keys.data_ptr(),
        keys.stride(0) * keys.itemsize,
        stored_keys.data_ptr(),
        stored_keys.stride(0) * keys.itemsize,
        values.data_ptr(),
        values.stride(0) * values.itemsize,
        stored_values.data_ptr(),
        stored_values.stride(0) * values.itemsize,
    )


def _is_dense(rows: Tensor) -> bool:
    """[T, heads, d] with nothing between the heads."""
    return rows.stride()[1:] == (rows.shape[2], 1)


def attend_group(group: Group, queries: Tensor, store: KVStore, layer: int, style: Style) -> Tensor:
    """Queries [B * num_tokens, heads, d] of one group -> [B * num_tokens, heads, value dim].

    The group is one that `supports` accepts.
    """
    keys, values = store.slots(layer)
    num_heads, dim = queries.shape[1:]
    num_kv_heads, value_dim = values.shape[1:]
    if not _is_dense(queries):
        queries = queries.contiguous()
    size = scratch_bytes(group.num_tokens, num_heads, value_dim)
    scratch = torch.empty(torch.get_num_threads() * size, dtype=torch.uint8)
    output = queries.new_empty(len(queries), num_heads, value_dim)
    described = describe([group], -group.rows.start)
    kind = Kind(dim, value_dim, num_heads // num_kv_heads, BITS[keys.dtype])
    attending(kind)(
        queries.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        output.data_ptr(),
        scratch.data_ptr(),
        size,
        described.ctypes.data,
        1,
        num_kv_heads,
        queries.stride(0) * queries.itemsize,
        store.page_size,
        style.window,
        style.scale_for(dim),
    )
    return output


def describe(groups: Iterable[Group], shift: int = 0) -> Any:
    """What the kernel reads of them, int64; good for as long as the groups live.

    `shift` is added to their first rows: to count them from somewhere else.
    """
    numbers = []
    for group in groups:
        paging = group.paging()
        table = paging.table
        numbers += [
            group.rows.start + shift,
            table.data_ptr(),
            table.stride(0) * table.itemsize,
            paging.starts.data_ptr(),
            paging.lengths.data_ptr(),
            group.num_spans,
            group.num_tokens,
        ]
    return np.array(numbers, np.int64)

"""Attention of packed spans over the paged KV memory, called by transformers' own layers.

transformers hands every layer's queries, keys and values to a registered function and knows no
cache here (`use_cache=False`). The function finds its model's PagedAttention on the calling
module, so that any number of models live in one process.

Grouped queries are not repeated: the query heads of one KV head are laid side by side as rows
(head, token), and one row block attends to that KV head once.
"""

from __future__ import annotations

from collections.abc import Sequence as Row
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel

from server.cache.kv_store import KVStore
from server.runner.grouping import MAX_GROUPED_TOKENS
from server.runner.plan import ForwardPlan, Group, SharedKeys
from server.runner.style import Style

NAME = "cos_paged"
_ATTRIBUTE = "cos_paged_attention"
# A block of queries of torch's memory-efficient kernel for GPUs, or half of one. Where the last
# block holds a single query and heads share their keys, that kernel, up to torch 2.13, takes the
# first query's bias for it (pytorch/pytorch#191937).
_CUDA_BLOCK = 32
# Elsewhere torch would make the bias anew for every layer.
_CAUSAL_DEVICES = {"cuda"}


class ShortAttention(Protocol):
    """Attention by other means than torch's: of groups of few tokens, and what else it supports.

    The modules `triton_attention` and `simd_attention` are such, as a whole.
    """

    def supports(
        self, group: Group, queries: Tensor, store: KVStore, layer: int, style: Style
    ) -> bool:
        """May `attend_group` be called with this?"""
        ...

    def max_tokens(self, heads: int, dim: int, element_size: int) -> int:
        """The longest spans it supports, for so many query heads a KV head of so many numbers."""
        ...

    def write(
        self, store: KVStore, layer: int, slots: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """As KVStore.write."""
        ...

    def attend_group(
        self, group: Group, queries: Tensor, store: KVStore, layer: int, style: Style
    ) -> Tensor:
        """Queries [B * num_tokens, heads, d] -> [B * num_tokens, heads, value dim]."""
        ...


class PagedAttention:
    """Writes the new tokens' KV of a layer, then attends every group of the current plan.

    Attributes:
        store: KV memory of the model.
        short: attends the groups it supports; None: all attention is torch's.
        plan: of the forward in progress; set before it, None outside.
        declined: has `short` left a group of few tokens to torch?
    """

    def __init__(self, store: KVStore, short: ShortAttention | None = None) -> None:
        self.store = store
        self.short = short
        self.plan: ForwardPlan | None = None
        self.declined = False

    def attach(self, model: PreTrainedModel) -> None:
        """Make `model` attend through this object."""
        AttentionInterface.register(NAME, _attend)
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, _ATTRIBUTE, self)
        model.set_attn_implementation(NAME)

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, style: Style
    ) -> Tensor:
        """Queries [T, heads, d], keys and values [T, kv_heads, d] -> [T, heads, value dim]."""
        assert self.plan is not None, "attention is called outside of TorchRunner.forward"
        if self.short is None:
            self.store.write(layer, self.plan.slots, keys, values)
        else:
            self.short.write(self.store, layer, self.plan.slots, keys, values)
        groups = self.plan.groups
        if len(groups) == 1:
            return self._attend_group(groups[0], queries, layer, style)
        return torch.cat(
            [self._attend_group(group, queries[group.rows], layer, style) for group in groups]
        )

    def _attend_group(self, group: Group, queries: Tensor, layer: int, style: Style) -> Tensor:
        if self.short and self.short.supports(group, queries, self.store, layer, style):
            return self.short.attend_group(group, queries, self.store, layer, style)
        self.declined |= self.short is not None and group.num_tokens <= MAX_GROUPED_TOKENS
        return attend_group(group, queries, self.store, layer, style)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The function transformers calls, with its names: query [1, heads, T, d] and so on."""
    assert attention_mask is None, "the page plan says what is seen, no mask is expected"
    attention = getattr(module, _ATTRIBUTE)
    assert isinstance(attention, PagedAttention)
    style = Style(scaling, sliding_window or 0, softcap, s_aux)
    rows = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    return attention.attend(module.layer_idx, *rows, style)[None], None  # type: ignore[arg-type]


def attend_group(group: Group, queries: Tensor, store: KVStore, layer: int, style: Style) -> Tensor:
    """Queries [B * num_tokens, heads, d] of one group -> [B * num_tokens, heads, value dim].

    The portable path: torch's own operations over views of the pages, or copies.
    """
    if (shared := group.shared()) is not None:
        if _is_plain(style, store, layer):
            return _attend_shared(group, shared, queries, store, layer, style)
        # Together they are only for their common beginning: all keys of all would be copied.
        return torch.cat(
            [attend_group(one, queries[one.rows], store, layer, style) for one in group.alone()]
        )
    keys, values = store.read(layer, group.selection(style.window).slots)
    if keys.dim() == 3:
        keys, values = keys[None], values[None]
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if style.softcap is not None or style.sinks is not None:
        return _attend_plainly(group, queries, keys, values, style)
    if group.num_tokens > MAX_GROUPED_TOKENS:
        return _attend_long(group, queries, keys, values, style)
    return _attend_packed(group, queries, keys, values, style)


def _is_plain(style: Style, store: KVStore, layer: int) -> bool:
    """Can its attention be put together of two parts by torch's kernel?"""
    keys, values = store.slots(layer)
    is_square = keys.shape[-1] == values.shape[-1]
    return not style.window and style.softcap is None and style.sinks is None and is_square


def _attend_packed(
    group: Group, queries: Tensor, keys: Tensor, values: Tensor, style: Style
) -> Tensor:
    """Few tokens a span; keys and values [B, kv_heads, L, d]."""
    packed = _pack(group, queries, keys.shape[1])
    bias = group.bias(style.window, queries.shape[1] // keys.shape[1], queries.dtype)
    return _unpack(
        group,
        F.scaled_dot_product_attention(packed, keys, values, attn_mask=bias, scale=style.scale),
    )


def _attend_shared(
    group: Group, shared: SharedKeys, queries: Tensor, store: KVStore, layer: int, style: Style
) -> Tensor:
    """The common beginning once for the queries of all spans, and what follows for each.

    Each part's softmax is over its own keys; their sums of exponentials say how much of the whole
    a part is (Ye et al. 2024, "Cascade Inference"; Juravsky et al. 2024, "Hydragen").
    """
    first = [part if part.dim() == 4 else part[None] for part in store.read(layer, shared.slots)]
    num_kv_heads = first[0].shape[2]
    packed = _pack(group, queries, num_kv_heads)
    batch, _, rows, dim = packed.shape
    together = packed.transpose(0, 1).reshape(1, num_kv_heads, batch * rows, dim)
    output, weight = _attend_with_sums(together, first, None, style.scale)
    output = output.view(num_kv_heads, batch, rows, -1).transpose(0, 1)
    weight = weight.view(num_kv_heads, batch, rows).transpose(0, 1)
    bias = group.own_bias(shared, queries.shape[1] // num_kv_heads, queries.dtype)
    own, own_weight = _attend_with_sums(
        packed, store.read(layer, shared.own.slots), bias, style.scale
    )
    share = torch.sigmoid(weight - own_weight)[..., None]
    return _unpack(group, torch.lerp(own.float(), output.float(), share).to(queries.dtype))


def _attend_with_sums(
    queries: Tensor, memory: Row[Tensor], bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Queries [B, kv_heads, rows, d], keys and values [B, L, kv_heads, d].

    Returns:
        [B, kv_heads, rows, d], and the logarithm of the sum of exponentials [B, kv_heads, rows].
    """
    keys, values = (part.transpose(1, 2) for part in memory)
    output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, attn_mask=bias, scale=scale
    )
    return output, sums


def _attend_long(
    group: Group, queries: Tensor, keys: Tensor, values: Tensor, style: Style
) -> Tensor:
    """One span of many tokens; keys and values [1, kv_heads, L, d].

    KV heads take the place of the batch and each is seen by its query heads without a copy, so
    that one [num_tokens, L] bias serves all heads. GPUs' kernels need none where the queries are
    those of the last tokens and see all before them, and are faster without.
    """
    num_heads, num_kv_heads = queries.shape[1], keys.shape[1]
    heads = queries.reshape(len(queries), num_kv_heads, -1, queries.shape[-1]).permute(1, 2, 0, 3)
    shared = (num_kv_heads, num_heads // num_kv_heads, -1, -1)
    from_start = group.is_whole(style.window)
    bias: Tensor | None = None
    if not from_start and not style.window and queries.device.type in _CAUSAL_DEVICES:
        bias = causal_lower_right(len(queries), keys.shape[2])
    elif not from_start:
        bias = group.bias(style.window, 1, queries.dtype)
        if bias is not None and len(queries) % _CUDA_BLOCK == 1:
            heads, bias = F.pad(heads, (0, 0, 0, 1)), F.pad(bias, (0, 0, 0, 1))
    output = F.scaled_dot_product_attention(
        heads,
        keys[0][:, None].expand(shared),
        values[0][:, None].expand(shared),
        attn_mask=bias,
        is_causal=from_start,
        scale=style.scale,
    )
    return output[:, :, : len(queries)].permute(2, 0, 1, 3).flatten(1, 2)


def _attend_plainly(
    group: Group, queries: Tensor, keys: Tensor, values: Tensor, style: Style
) -> Tensor:
    """Softcap and sinks, written out; keys and values [B, kv_heads, L, d]."""
    num_kv_heads = keys.shape[1]
    repeats = queries.shape[1] // num_kv_heads
    scale = queries.shape[-1] ** -0.5 if style.scale is None else style.scale
    scores = (_pack(group, queries, num_kv_heads) @ keys.transpose(2, 3)).float() * scale
    if style.softcap is not None:
        scores = style.softcap * torch.tanh(scores / style.softcap)
    if (bias := group.bias(style.window, repeats, torch.float32)) is not None:
        scores = scores + bias
    if style.sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = style.sinks.float().view(1, num_kv_heads, repeats, 1)
        sinks = sinks.repeat_interleave(group.num_tokens, 2).expand(len(scores), -1, -1, -1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return _unpack(group, weights.to(values.dtype) @ values)


def _pack(group: Group, queries: Tensor, num_kv_heads: int) -> Tensor:
    """[B * tokens, heads, d] -> [B, kv_heads, repeats * tokens, d]."""
    if group.num_tokens == 1:  # it lies so already
        return queries.reshape(len(queries), num_kv_heads, -1, queries.shape[-1])
    size = (group.num_spans, group.num_tokens, num_kv_heads, -1, queries.shape[-1])
    return queries.reshape(size).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unpack(group: Group, output: Tensor) -> Tensor:
    """[B, kv_heads, repeats * tokens, d] -> [B * tokens, heads, d]."""
    if group.num_tokens == 1:
        return output.reshape(len(output), -1, output.shape[-1])
    num_kv_heads, dim = output.shape[1], output.shape[-1]
    by_head = output.reshape(group.num_spans, num_kv_heads, -1, group.num_tokens, dim)
    return by_head.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)

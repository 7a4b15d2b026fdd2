"""The expert at work: continues batches of prompts and keeps its hidden state of every token.

Prompts are padded on the left, so that all sequences of a batch write the same KV column at a
step. The hidden state (after the final norm) is all that training needs: times the head's weights
it gives the expert's exact distribution again, at 1 kB per token instead of 200 kB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaForCausalLM

ATTENTION = "distill"


@dataclass(frozen=True, slots=True)
class Written:
    """One sequence: its tokens, where the continuation starts, the expert's state per token."""

    token_ids: Tensor  # [num_tokens] int64
    num_prompt: int
    hidden: Tensor  # [num_tokens, hidden_size]; row t scores token t + 1


class KVCache:
    """Keys and values of a batch, one column per step; `mask` hides the padding on the left."""

    def __init__(self, padding: Tensor, num_columns: int) -> None:
        """Padding [batch] says how many leading columns of each sequence are empty."""
        self.start = 0
        self._shape = (len(padding), num_columns)
        columns = torch.arange(num_columns, device=padding.device)
        self._real = columns[None, :] >= padding[:, None]
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            batch, columns = self._shape
            shape = (batch, keys.shape[1], columns, keys.shape[3])
            self._layers[layer] = (keys.new_zeros(shape), values.new_zeros(shape))
        end = self.start + keys.shape[2]
        for stored, new in zip(self._layers[layer], (keys, values), strict=True):
            stored[:, :, self.start : end] = new
        all_keys, all_values = self._layers[layer]
        return all_keys[:, :, :end], all_values[:, :, :end]

    def mask(self, num_new: int) -> Tensor:
        """[batch, 1, num_new, columns so far]: which columns each new token attends to."""
        end = self.start + num_new
        columns = torch.arange(end, device=self._real.device)
        causal = columns[None, :] <= columns[self.start :, None]
        # A padding row attends to itself only: a row that attends to nothing would turn into NaN.
        itself = columns[None, :] == columns[self.start :, None]
        return ((causal & self._real[:, None, :end]) | itself)[:, None]


def _attend(
    module: torch.nn.Module,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    kv_cache: KVCache | None = None,
    kv_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over a KVCache, query heads of a group packed as rows so KV isn't repeated."""
    assert kv_cache is not None
    assert kv_mask is not None
    keys, values = kv_cache.extend(int(module.layer_idx), keys, values)  # type: ignore[arg-type]
    batch, heads, rows, size = queries.shape
    group = heads // keys.shape[1]
    packed = queries.reshape(batch, keys.shape[1], group * rows, size)
    mask = kv_mask.expand(-1, group, -1, -1).reshape(batch, 1, group * rows, -1)
    out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, rows, size).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)


class Writer:
    """Writes continuations with one model."""

    def __init__(self, model: LlamaForCausalLM, stop_ids: Sequence[int]) -> None:
        model.set_attn_implementation(ATTENTION)
        self._model = model
        self._device = model.device
        self._stop_ids = torch.tensor(list(stop_ids), device=self._device)

    @torch.inference_mode()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        num_new: int,
        generator: torch.Generator,
        on_token: Callable[[], object] = lambda: None,
    ) -> list[Written]:
        """Continues each prompt at its own temperature (0 is greedy) by up to `num_new` tokens."""
        width = max(map(len, prompts))
        padding = torch.tensor([width - len(p) for p in prompts], device=self._device)
        rows = [[0] * (width - len(p)) + list(p) for p in prompts]
        fed = torch.tensor(rows, device=self._device)
        cache = KVCache(padding, width + num_new)
        heat = torch.tensor(list(temperatures), device=self._device)[:, None]
        tokens, states = [fed], []
        live = torch.ones(len(prompts), dtype=torch.bool, device=self._device)
        for _ in range(num_new):
            states.append(self._forward(fed, padding, cache))
            logits = self._model.lm_head(states[-1][:, -1]).float()
            fed = draw(logits, heat, generator)
            tokens.append(fed)
            on_token()
            live &= ~torch.isin(fed[:, 0], self._stop_ids)
            if not live.any():
                break
        return self._split(torch.cat(tokens, 1), torch.cat(states, 1), padding.tolist(), width)

    def _forward(self, fed: Tensor, padding: Tensor, cache: KVCache) -> Tensor:
        """Feeds [batch, new] -> hidden states [batch, new, hidden_size]."""
        columns = torch.arange(cache.start, cache.start + fed.shape[1], device=self._device)
        hidden: Tensor = self._model.model(
            input_ids=fed,
            position_ids=(columns[None] - padding[:, None]).clamp(min=0),
            use_cache=False,
            kv_cache=cache,
            kv_mask=cache.mask(fed.shape[1]),
        ).last_hidden_state
        cache.start += fed.shape[1]
        return hidden

    def _split(
        self, tokens: Tensor, hidden: Tensor, padding: list[int], width: int
    ) -> list[Written]:
        """One `Written` per row, cut after its first stop token."""
        stops = torch.isin(tokens[:, width:], self._stop_ids)
        everything = torch.full_like(stops[:, 0], stops.shape[1], dtype=torch.long)
        lengths = torch.where(stops.any(1), stops.int().argmax(1) + 1, everything)
        written = []
        for row, (skip, new) in enumerate(zip(padding, lengths.tolist(), strict=True)):
            # The last token was drawn but not fed, so it has no state and is dropped from `hidden`.
            ids = tokens[row, skip : width + new].cpu()
            state = hidden[row, skip : width + new - 1].cpu()
            written.append(Written(ids, width - skip, state))
        return written


def draw(logits: Tensor, temperatures: Tensor, generator: torch.Generator) -> Tensor:
    """From logits [rows, vocab], temperatures [rows, 1] -> token ids [rows, 1].

    By the inverse of the distribution function: one uniform number a row.
    """
    greedy = logits.argmax(-1, keepdim=True)
    uniform = torch.rand(greedy.shape, generator=generator, device=logits.device)
    cumulative = logits.div(temperatures.clamp(min=1e-3)).softmax(-1).cumsum_(-1)
    # Below the whole mass, so that rounding can't point past the last token.
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:] * (1 - 1e-6), right=True)
    return torch.where(temperatures > 0, drawn, greedy)

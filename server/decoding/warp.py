"""Warps: temperature, truncation, penalties and biases, applied to logits row by row.

Order: repetition, frequency and presence penalties; logit_bias; masks (of a grammar, allowed
tokens, tokens that complete a bad word, stop tokens before min_tokens); temperature; min-p; top-k;
top-p. A row is one position of one sequence, and penalties and masks look at the tokens before that
position, pending ones included, so that a position's warp is the same whether it is proposed,
verified or drawn.

Greedy rows are warped at temperature 1 without truncation: greedy text takes the most probable
token of the *combined* distribution (`combine.rank`).
"""

from __future__ import annotations

from collections.abc import Sequence as Row

import torch
from torch import Tensor
from torch.nn.functional import pad

from server.cache.on_device import sent, tensor_on
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.core.token_mask import Bits, stacked

Place = tuple[Sequence, int]  # a sequence and a position of it

_HEAD = 1024  # top-p looks at so many tokens first, and sorts the whole row only if it has to


class Warp:
    """The warps of R rows, to be applied to logits [R, V] of any model or of their mix."""

    def __init__(
        self,
        places: Row[Place],
        eos_token_ids: frozenset[int],
        device: torch.device,
        proposing: bool = False,
    ):
        """`proposing`: where top-p would keep a great many tokens, it keeps the most probable ones.

        A model may propose from what it likes as long as verification is told, and whether a whole
        row has to be sorted is known only to who reads from the device. What is kept of a row
        never depends on the other rows.
        """
        self._sorts = not proposing
        self._places = places
        self._eos = eos_token_ids
        self._device = device
        params = [sequence.params for sequence, _ in places]
        self._is_adjusted = any(p.has_penalties or p.logit_bias for p in params)
        self._bans = any(p.bad_words or p.min_tokens for p in params)
        self._masks = _masks(places, device)
        temperature = [1.0 if p.is_greedy else p.temperature for p in params]
        self._is_tempered = any(t != 1.0 for t in temperature)
        self._temperature = tensor_on(device, temperature)[:, None]
        self._min_p = _column([0.0 if p.is_greedy else p.min_p for p in params], 0.0, device)
        top_k = [0 if p.is_greedy else p.top_k for p in params]
        self._width = max([_HEAD, *top_k])
        self._top_k = _column(top_k, 0, device)
        self._top_p = _column([1.0 if p.is_greedy else p.top_p for p in params], 1.0, device)
        truncated = [not p.is_greedy and (p.top_k > 0 or p.top_p < 1) for p in params]
        self._is_truncated = tensor_on(device, truncated)[:, None]

    def __call__(self, logits: Tensor) -> Tensor:
        """float32 [R, V] -> warped logits [R, V]; the argument is left alone."""
        if self._is_adjusted:
            logits = logits.clone()
            for row, place in enumerate(self._places):
                _adjust(logits[row], *place)
        logits = self.forbid(logits)
        if self._is_tempered:
            logits = logits / self._temperature
        if self._min_p is not None:
            floor = logits.amax(-1, keepdim=True) + self._min_p.log()
            logits = logits.masked_fill(logits < floor, -torch.inf)
        if self._top_k is not None or self._top_p is not None:
            threshold = self._threshold(logits)
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        return logits

    def forbid(self, logits: Tensor) -> Tensor:
        """float32 [R, V] -> the same without the tokens that masks leave no probability."""
        if self._masks is not None:
            rows, packed = self._masks
            allowed = _unpack(packed, logits.shape[-1])
            logits = logits.index_copy(0, rows, logits[rows].masked_fill(~allowed, -torch.inf))
        if self._bans:
            logits = logits.clone()
            for row, place in enumerate(self._places):
                _ban(logits[row], *place, self._eos)
        return logits

    def _threshold(self, logits: Tensor) -> Tensor:
        """Smallest logit that top-k and top-p keep, [R, 1]; ties at it are kept.

        Looks at the largest logits of each row, and at whole rows only where they keep more.
        """
        width = min(self._width, logits.shape[-1])
        ordered = logits.topk(width).values
        keep = _keep(logits, ordered, self._top_k, self._top_p)
        if not self._sorts and self._top_k is not None:
            # Another row's top-k may have widened the head.
            keep &= torch.arange(width, device=keep.device) < self._top_k.clamp_min(_HEAD)
        threshold = torch.where(self._is_truncated, _last(ordered, keep), -torch.inf)
        if width < logits.shape[-1] and self._sorts:
            rows = (keep[:, -1:] & self._is_truncated).flatten().nonzero().flatten()
            if len(rows):
                whole = logits[rows]
                ordered = whole.sort(descending=True).values
                keep = _keep(whole, ordered, _pick(self._top_k, rows), _pick(self._top_p, rows))
                threshold[rows] = _last(ordered, keep)
        return threshold

    def probs(self, logits: Tensor) -> Tensor:
        """Softmax of the warped logits: float32 [R, V]."""
        return self(logits).softmax(-1)


def depends_on_tokens(sequence: Sequence) -> bool:
    """Do warps of a position look at the tokens before it? Then these have to be known."""
    params = sequence.params
    return params.has_penalties or bool(params.bad_words) or sequence.matcher is not None


def _last(ordered: Tensor, keep: Tensor) -> Tensor:
    """The last of the `ordered` logits [R, width] that is kept, one at least: [R, 1]."""
    return ordered.gather(1, keep.sum(-1, keepdim=True).clamp_min(1) - 1)


def _keep(logits: Tensor, ordered: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Which of the `ordered` logits [R, width] (best first) survive; a prefix of each row."""
    keep = torch.ones_like(ordered, dtype=torch.bool)
    total = logits.logsumexp(-1, keepdim=True)
    if top_k is not None:
        limit = torch.where(top_k == 0, logits.shape[-1], top_k)
        keep = torch.arange(ordered.shape[-1], device=ordered.device) < limit
        # The mass that top-p counts is relative to what top-k left.
        within = ordered.masked_fill(~keep, -torch.inf).logsumexp(-1, keepdim=True)
        total = torch.where(top_k == 0, total, within)
    if top_p is not None:
        probs = (ordered - total).exp()
        keep = keep & ((probs.cumsum(-1) - probs < top_p) | (top_p >= 1))
    return keep


def _pick(column: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if column is None else column[rows]


def _column(values: Row[float], neutral: float, device: torch.device) -> Tensor | None:
    """[R, 1], or None where no row uses the warp."""
    if all(value == neutral for value in values):
        return None
    return tensor_on(device, values)[:, None]


def _adjust(logits: Tensor, sequence: Sequence, position: int) -> None:
    """Penalties and biases of one row [V], in place."""
    params = sequence.params
    if params.has_penalties:
        _penalise(logits, sequence, position)
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        logits.index_add_(0, _ids(ids, logits), tensor_on(logits.device, biases))


def _ban(logits: Tensor, sequence: Sequence, position: int, eos: frozenset[int]) -> None:
    """Bad words and ends that come too early, of one masked row [V], in place."""
    if banned := bad_tokens(sequence, position):
        logits[_ids(banned, logits)] = -torch.inf
    if is_early(sequence, position) and (ending := ending_tokens(sequence.params, eos)):
        ends = _ids(sorted(ending), logits)
        kept = logits[ends]
        logits[ends] = -torch.inf
        if sequence.matcher is not None and logits.max() == -torch.inf:
            logits[ends] = kept  # the grammar is complete: it ends the text all the same


def _masks(places: Row[Place], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Rows that have a mask, int64 [M], and these, uint8 [M, bytes]; None where no row has one."""
    found = masks_of(places)
    if not found:
        return None
    packed = stacked([*found.values()], max(map(len, found.values())))
    return tensor_on(device, [*found]), sent(torch.from_numpy(packed), device)


def masks_of(places: Row[Place]) -> dict[int, Bits]:
    """By row, of those that have one."""
    masks = ((row, sequence.mask(position)) for row, (sequence, position) in enumerate(places))
    return {row: mask for row, mask in masks if mask is not None}


def _unpack(packed: Tensor, vocab_size: int) -> Tensor:
    """Bits of [M, bytes], the lowest of each byte first: bool [M, vocab_size]."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    unpacked = ((packed[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]
    return pad(unpacked, (0, vocab_size - unpacked.shape[1]))


def bad_tokens(sequence: Sequence, position: int) -> list[int]:
    """Those that would complete a bad word there."""
    return [w[-1] for w in sequence.params.bad_words if _completes(w, sequence, position)]


def is_early(sequence: Sequence, position: int) -> bool:
    """Must the text be longer before a token there may end it?"""
    return position < sequence.num_prompt + sequence.params.min_tokens


def ending_tokens(params: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Those that end a text."""
    return params.stop_token_ids if params.ignore_eos else params.stop_token_ids | eos_token_ids


def _completes(word: tuple[int, ...], sequence: Sequence, position: int) -> bool:
    """Whether the generated tokens before `position` end with all of `word` but its last."""
    start = position - len(word) + 1
    return start >= sequence.num_prompt and sequence.token_ids[start:position] == list(word[:-1])


def _penalise(logits: Tensor, sequence: Sequence, position: int) -> None:
    params, device = sequence.params, logits.device
    tokens, counts = sequence.counts_before(position)
    if params.repetition_penalty != 1:
        seen = sent(torch.from_numpy(tokens), device)
        scores = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if params.frequency_penalty or params.presence_penalty:
        made = counts > 0
        times = sent(torch.from_numpy(counts[made]), device).to(logits.dtype)
        ids = sent(torch.from_numpy(tokens[made]), device)
        logits[ids] -= params.frequency_penalty * times + params.presence_penalty


def _ids(token_ids: Row[int], logits: Tensor) -> Tensor:
    return tensor_on(logits.device, list(token_ids), torch.long)

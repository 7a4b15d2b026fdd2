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

from collections.abc import Callable, Sequence as Row
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from server.cache.on_device import sent, tensor_on
from server.core.sequence import Sequence
from server.core.token_mask import Bits, stacked
from server.decoding.score_changes import (
    NONE,
    Changes,
    added,
    bad_tokens,
    ending_tokens,
    forbidden,
    is_early,
    joined,
    penalties,
)

Place = tuple[Sequence, int]  # a sequence and a position of it

_HEAD = 1024  # truncation looks at so many tokens first, and sorts the whole row only if it has to


class Warp:
    """The warps of R rows, to be applied to logits [R, V] of any model or of their mix."""

    def __init__(
        self,
        places: Row[Place],
        eos_token_ids: frozenset[int],
        device: torch.device,
        proposing: bool = False,
    ):
        """`proposing`: where truncation keeps a great many tokens, it keeps the most probable ones.

        A model may propose from what it likes as long as verification is told, and whether a whole
        row has to be sorted is known only to who reads from the device. What is kept of a row
        never depends on the other rows.
        """
        self._sorts = not proposing
        self._eos = eos_token_ids
        params = [sequence.params for sequence, _ in places]
        # Most requests ask for none of it; looking through their places takes the host's time.
        adjusted = places if any(p.adjusts_scores for p in params) else ()
        self._penalised = _cells(adjusted, penalties, device)
        self._biased = _cells(adjusted, lambda s, _: added(s.params.logit_bias), device)
        self._masks = _masks(places, device)
        self._banned = _cells(adjusted, self._bans, device)
        self._last_ends = _cells(adjusted, self._ends_amid_form, device)
        temperature = [1.0 if p.is_greedy else p.temperature for p in params]
        self._temperature = _column(temperature, 1.0, device)
        self._min_p = _column([0.0 if p.is_greedy else p.min_p for p in params], 0.0, device)
        top_k = [0 if p.is_greedy else p.top_k for p in params]
        self._top_k = _column(top_k, 0, device)
        self._top_p = _column([1.0 if p.is_greedy else p.top_p for p in params], 1.0, device)

    def __call__(self, logits: Tensor) -> Tensor:
        """float32 [R, V] -> warped logits [R, V]; the argument is left alone."""
        logits = self.forbid(self._adjust(logits))
        if self._temperature is not None:
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
        if self._banned is not None or self._last_ends is not None:
            logits = logits.clone()
            if self._banned is not None:
                logits[self._banned.places] = self._banned.added
            if self._last_ends is not None:
                _forbid_ends(logits, self._last_ends)
        return logits

    def _adjust(self, logits: Tensor) -> Tensor:
        """Penalties and biases."""
        if self._penalised is None and self._biased is None:
            return logits
        logits = logits.clone()
        if self._penalised is not None:
            scores, divisors = logits[self._penalised.places], self._penalised.divisors
            scores = torch.where(scores > 0, scores / divisors, scores * divisors)
            logits[self._penalised.places] = scores + self._penalised.added
        if self._biased is not None:
            # A token may be named twice.
            logits.index_put_(self._biased.places, self._biased.added, accumulate=True)
        return logits

    def _bans(self, sequence: Sequence, position: int) -> Changes:
        """Tokens that complete a bad word, and ends that come too early."""
        banned = bad_tokens(sequence, position)
        if sequence.matcher is None and is_early(sequence, position):
            banned += ending_tokens(sequence.params, self._eos)
        return forbidden(banned)

    def _ends_amid_form(self, sequence: Sequence, position: int) -> Changes:
        """Ends that come too early, unless the grammar is complete: it then ends all the same."""
        if sequence.matcher is None or not is_early(sequence, position):
            return NONE
        return forbidden(ending_tokens(sequence.params, self._eos))

    def _threshold(self, logits: Tensor) -> Tensor:
        """Smallest logit that top-k and top-p keep, [R, 1]; ties at it are kept.

        Looks at the largest logits of each row, and at whole rows only where they keep more.
        """
        vocab_size = logits.shape[-1]
        width = min(_HEAD, vocab_size)
        top_k, top_p = self._top_k, self._top_p
        if top_k is not None:
            top_k = top_k.masked_fill(top_k >= vocab_size, 0)
        is_truncated = _is_truncated(top_k, top_p)
        ordered = logits.topk(width).values
        keep = _keep(logits, ordered, top_k, top_p)
        threshold = torch.where(is_truncated, _last(ordered, keep), -torch.inf)
        if width < vocab_size and self._sorts:
            # Beyond the head there may be more to keep, or mass that top-p counts.
            is_wide = keep[:, -1:] if top_k is None else keep[:, -1:] | (top_k > width)
            rows = (is_wide & is_truncated).flatten().nonzero().flatten()
            if len(rows):
                whole = logits[rows]
                ordered = whole.sort(descending=True).values
                keep = _keep(whole, ordered, _pick(top_k, rows), _pick(top_p, rows))
                threshold[rows] = _last(ordered, keep)
        return threshold

    def probs(self, logits: Tensor) -> Tensor:
        """Softmax of the warped logits: float32 [R, V]."""
        return self(logits).softmax(-1)


def depends_on_tokens(sequence: Sequence) -> bool:
    """Do warps of a position look at the tokens before it? Then these have to be known."""
    params = sequence.params
    return params.has_penalties or bool(params.bad_words) or sequence.matcher is not None


def _is_truncated(top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Which rows are, [R, 1]; one of the two is given."""
    if top_k is None:
        assert top_p is not None
        return top_p < 1
    return top_k > 0 if top_p is None else (top_k > 0) | (top_p < 1)


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


@dataclass(frozen=True, slots=True)
class _Cells:
    """Scores of single tokens.

    Attributes:
        places: rows and tokens, int64 [N] each.
        divisors, added: float32 [N]; see `decoding.score_changes`. What is forbidden is added
            -inf, and assigned these: a GPU would be waited for to bring it a number of the host's.
    """

    places: tuple[Tensor, Tensor]
    divisors: Tensor
    added: Tensor


def _cells(
    places: Row[Place], changes_of: Callable[[Sequence, int], Changes], device: torch.device
) -> _Cells | None:
    """Those that change; None where none does."""
    found = [changes_of(*place) for place in places]
    tokens, changes = joined(found)
    if not len(tokens):
        return None
    rows = np.repeat(np.arange(len(found)), [len(each) for each, _ in found])
    ids = sent(torch.from_numpy(np.stack([rows, tokens])), device)
    numbers = sent(torch.from_numpy(np.ascontiguousarray(changes.T)), device)
    return _Cells((ids[0], ids[1]), numbers[0], numbers[1])


def _forbid_ends(logits: Tensor, ends: _Cells) -> None:
    """Of rows [R, V] that leave something else; in place."""
    kept = logits[ends.places]
    logits[ends.places] = ends.added
    is_dead = logits.amax(-1) == -torch.inf
    logits[ends.places] = kept.masked_fill(~is_dead[ends.places[0]], -torch.inf)


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

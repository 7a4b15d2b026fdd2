"""Verification: exact acceptance of proposals, in one of three ways.

**Free** (Leviathan et al. 2023; paper eq. 6 and A.1). A token x that was proposed from g is
*accepted* with probability min(1, r(x) / g(x)). If it is not, the *recovered* token, drawn from
norm(max(0, r - g)), takes its place and the rest of the tail is dropped. A *drawn* token comes from
r with nothing proposed. Each position of a tail has its own g, that of its proposer; the law of the
output is r's whatever the proposers were, as long as proposer and g of a position are fixed before
its token is drawn, a drawn token leaves the tail only through verification, and the uniforms are
fresh (`rng`).

**Block** (Sun et al. 2025, arXiv 2403.10444). A window is decided as a whole: with p_0 = 1 and
p_i = min(1, p_{i-1} r(x_i) / g(x_i)), its longest prefix is kept whose length i passes a test of
its own, of probability

    h_i = S_i / (S_i + 1 - p_i),  S_i = sum_x max(0, p_i r_{i+1}(x) - g_{i+1}(x)),

h_n = p_n at the window's end, and the recovered token comes from
norm(max(0, p_i r_{i+1} - g_{i+1})). By induction from the end, x_1..x_i is kept with probability
p_i given x_1..x_i, never less than the product of the single acceptances; a window of one token is
decided as above. The law is exact as long as whether the window ends at a position depends on
tokens up to there and on no later one, and as long as the uniforms after a rejection are new: what
was kept has depended on all of the window.

**Coupled**. Exponential noise E, one value for each token, is a function of (seed, position), and
whoever has a distribution p for the position picks argmax p / E, which has law p (the Gumbel-max
trick: argmax log p + G). A proposal is the pick of g, the position's token is the pick of r with
the same noise, and a proposal is accepted iff it is that token. So the text depends on the seed and
on r alone, not on who proposed how many tokens; the price is that fewer proposals are accepted than
min(1, r / g) would. Greedy decoding is this without noise.

Results stay on the device; on a GPU nothing is read back from it but by `block_tests`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from server.cache.on_device import reading_waits, tensor_on

Rule = Literal["coupled", "block", "token"]

_PART = 128  # of a row; a vocabulary that is no multiple of it is copied

INVALID = -1  # sampled from a row that is no distribution: NaN or without mass

# Of W windows, int64 [W, 2]: tokens accepted from the start of each, and the token that replaces
# the first rejected one, INVALID where its target is no distribution and without meaning where all
# were accepted. See `verdicts`.
Decisions = Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the verified window of one sequence.

    Attributes:
        num_accepted: tokens accepted from the start of the window.
        recovered: the token that replaces the first rejected one; None where all were accepted,
            INVALID where the target was no distribution.
    """

    num_accepted: int
    recovered: int | None


def verdicts(decisions: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Verdict]:
    """Of windows with `lengths` rows; `decisions`, as read, may be of longer windows."""
    return [
        Verdict(min(count, length), recovered if count < length else None)
        for (count, recovered), length in zip(decisions, lengths, strict=True)
    ]


def sample(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token from each row by inverse CDF.

    First a part of the row, then a token in it: running sums of a whole row take a GPU one pass
    after the other, and lose more to rounding.

    Args:
        probs: float32 [R, V], not negative, not necessarily normalised.
        uniforms: float32 [R] in [0, 1).

    Returns:
        int64 [R] token ids, INVALID for rows that are no distribution.
    """
    if missing := -probs.shape[1] % _PART:
        probs = pad(probs, (0, missing))
    parts = probs.reshape(len(probs), -1, _PART)
    sums = _cumulative(parts.sum(-1))
    total = sums[:, -1:]
    threshold = _below(uniforms[:, None] * total, total)
    part = torch.searchsorted(sums, threshold, right=True).clamp_max(sums.shape[1] - 1)
    before = torch.where(part > 0, sums.gather(1, (part - 1).clamp_min(0)), 0.0)
    within = _cumulative(parts.gather(1, part[:, :, None].expand(-1, -1, _PART))[:, 0])
    picked = torch.searchsorted(within, _below(threshold - before, within[:, -1:]), right=True)
    valid = torch.isfinite(total) & (total > 0)
    return torch.where(valid, part * _PART + picked, INVALID).flatten()


def _below(threshold: Tensor, total: Tensor) -> Tensor:
    """Strictly below the total, so that no token without mass at the end is ever chosen."""
    return torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))


def _cumulative(probs: Tensor) -> Tensor:
    """Sums of each row up to each token; the same over tokens without mass.

    What torch takes for a single row on a GPU adds up in an order that depends on the place, so a
    sum may grow by its last bit where nothing is added. Of two rows it takes something else.
    """
    if probs.is_cuda and len(probs) == 1:
        return probs.expand(2, -1).cumsum(-1)[:1]
    return probs.cumsum(-1)


def pick(weights: Tensor, noise: Tensor | None = None) -> Tensor:
    """The token of each row under coupled randomness: argmax of weights / noise.

    Args:
        weights: float32 [R, V]; probabilities, or without noise whatever ranks the tokens.
        noise: float32 [R, V], above 0 (`rng.exponentials`).

    Returns:
        int64 [R] token ids, INVALID for rows that are no distribution.
    """
    best = (weights if noise is None else weights / noise).max(-1)
    valid = best.values.isfinite()
    if noise is not None:
        valid &= best.values > 0
    return torch.where(valid, best.indices, INVALID)


def verify_picks(picks: Tensor, tokens: Tensor, lengths: Sequence[int]) -> Decisions:
    """Decide windows of coupled proposals: accepted iff equal to the target's own picks.

    Args:
        picks: of the target, int64 [R].
        tokens: the proposed token of each row, int64 [R].
        lengths: rows of each window, in order; they sum to R.
    """
    counts, rows = _first_rejected(picks == tokens, lengths)
    return torch.stack([counts, picks.index_select(0, rows)], dim=1)


def verify(
    target: Tensor,
    proposal: Tensor,
    tokens: Tensor,
    lengths: Sequence[int],
    accept_uniforms: Tensor,
    recover_uniforms: Tensor,
) -> Decisions:
    """Decide windows of proposed tokens, several sequences at once.

    Args:
        target: r of each row, float32 [R, V].
        proposal: g of each row, float32 [R, V].
        tokens: the proposed token of each row, int64 [R].
        lengths: rows of each window, in order; they sum to R.
        accept_uniforms: float32 [R], decide acceptance.
        recover_uniforms: float32 [R], draw the recovered tokens.
    """
    r = target.gather(1, tokens[:, None])[:, 0]
    g = proposal.gather(1, tokens[:, None])[:, 0]
    # Comparisons with NaN are false: a broken row is rejected, and sampling it yields INVALID.
    counts, rows = _first_rejected(accept_uniforms * g < r, lengths)
    return _recovered(target, proposal, counts, rows, lengths, recover_uniforms)


def verify_blocks(
    target: Tensor,
    proposal: Tensor,
    tokens: Tensor,
    lengths: Sequence[int],
    accept_uniforms: Tensor,
    recover_uniforms: Tensor,
) -> Decisions:
    """`verify`, with each window decided as a block; the same arguments and results."""
    tests, carry = block_tests(target, proposal, tokens, lengths)
    passed = [u < h for u, h in zip(accept_uniforms.tolist(), tests, strict=True)]
    windows = list(pairwise(accumulate(lengths, initial=0)))
    counts = [
        max((row - start + 1 for row in range(start, end) if passed[row]), default=0)
        for start, end in windows
    ]
    ends = [min(start + n, end - 1) for (start, end), n in zip(windows, counts, strict=True)]
    kept, rows = tensor_on(target.device, [counts, ends]).unbind(0)
    return _recovered(target, proposal, kept, rows, lengths, recover_uniforms, carry)


def block_tests(
    target: Tensor, proposal: Tensor, tokens: Tensor, lengths: Sequence[int]
) -> tuple[list[float], Tensor]:
    """The tests of block verification (h) and what they rest on (p); arguments as for `verify`.

    A row that is no distribution ends its block, so that it is met as often as by `verify`; which
    rows are depends on the tokens before them only.

    Returns:
        For each row, the probability of the test that keeps its window up to and including it; and
        [R], in the target's dtype, p of the tokens of the window before it.
    """
    column = tokens[:, None]
    # 0 / 0 is a token that neither gives anything to: not accepted, like by `verify`.
    odds = target.gather(1, column) / proposal.gather(1, column)
    ratios = odds[:, 0].nan_to_num(0.0).tolist()
    mass = target.sum(-1)
    is_valid = ((mass > 0) & (mass + proposal.sum(-1)).isfinite()).tolist()
    before: list[float] = []
    after: list[float] = []
    for start, end in pairwise(accumulate(lengths, initial=0)):
        p = 1.0
        for row in range(start, end):
            before.append(p if is_valid[row] else 1.0)
            p = min(1.0, p * ratios[row]) if is_valid[row] else 0.0
            after.append(p)
    carry = tensor_on(target.device, before, target.dtype)
    excess: list[float] = (carry[:, None] * target - proposal).clamp_min_(0).sum(-1).tolist()
    tests = list(after)
    for start, end in pairwise(accumulate(lengths, initial=0)):
        for row in range(start, end - 1):
            if is_valid[row + 1]:
                rest = excess[row + 1] + 1.0 - after[row]
                # Without rest the next token is accepted for certain, and the test decides nothing.
                tests[row] = excess[row + 1] / rest if rest > 0 else 1.0
    return tests, carry


def _first_rejected(is_accepted: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of each window the rows before its first rejection, int64 [W], and which row that one is.

    Args:
        is_accepted: bool [R].
        lengths: rows of each window, one at least.

    Returns:
        The second, int64 [W], is the window's last row where all are accepted.
    """
    device = is_accepted.device
    windows = [(window, i) for window, n in enumerate(lengths) for i in range(n)]
    window_of, offsets = tensor_on(device, windows).unbind(1)
    starts = [start for start, _ in pairwise(accumulate(lengths, initial=0))]
    first, length = tensor_on(device, [starts, list(lengths)]).unbind(0)
    rejected = torch.where(is_accepted, max(lengths), offsets)
    counts = length.scatter_reduce(0, window_of, rejected, "amin")
    return counts, first + torch.minimum(counts, length - 1)


def _recovered(
    target: Tensor,
    proposal: Tensor,
    counts: Tensor,
    rows: Tensor,
    lengths: Sequence[int],
    uniforms: Tensor,
    carry: Tensor | None = None,
) -> Decisions:
    """With the tokens for the first rejected `rows` [W], of which `counts` [W] were accepted."""
    if reading_waits(target.device):  # and which windows need one is not known
        return torch.stack([counts, _recover(target, proposal, rows, uniforms, carry)], dim=1)
    decisions = torch.stack([counts, torch.full_like(counts, INVALID)], dim=1)
    needed = (counts < tensor_on(target.device, list(lengths))).nonzero()[:, 0]
    if len(needed):
        decisions[needed, 1] = _recover(target, proposal, rows[needed], uniforms, carry)
    return decisions


def _recover(
    target: Tensor,
    proposal: Tensor,
    rows: Tensor,
    uniforms: Tensor,
    carry: Tensor | None = None,
) -> Tensor:
    """Draw from norm(max(0, carry * r - g)) for each of `rows`; `carry` [R] is 1 if not given."""
    r = target.index_select(0, rows)
    carried = r if carry is None else carry.index_select(0, rows)[:, None] * r
    residual = (carried - proposal.index_select(0, rows)).clamp_min_(0)
    # Rounding alone can reject a token where r equals g; nothing is left over then but r itself.
    is_empty = residual.sum(-1, keepdim=True) <= 0
    return sample(torch.where(is_empty, r, residual), uniforms.index_select(0, rows))

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
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from server.cache.on_device import tensor_on

INVALID = -1  # sampled from a row that is no distribution: NaN or without mass


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


def sample(probs: Tensor, uniforms: Tensor) -> list[int]:
    """Draw one token from each row by inverse CDF.

    Args:
        probs: float32 [R, V], not negative, not necessarily normalised.
        uniforms: float32 [R] in [0, 1).

    Returns:
        R token ids, INVALID for rows that are no distribution.
    """
    cumulative = _cumulative(probs)
    total = cumulative[:, -1:]
    # Strictly below the total, so that a token without mass at the end of a row is never chosen.
    threshold = torch.minimum(
        uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total))
    )
    picked = torch.searchsorted(cumulative, threshold, right=True)
    valid = torch.isfinite(total) & (total > 0)
    return torch.where(valid, picked, INVALID).flatten().tolist()


def _cumulative(probs: Tensor) -> Tensor:
    """Sums of each row up to each token; the same over tokens without mass.

    What torch takes for a single row on a GPU adds up in an order that depends on the place, so a
    sum may grow by its last bit where nothing is added. Of two rows it takes something else.
    """
    if probs.is_cuda and len(probs) == 1:
        return probs.expand(2, -1).cumsum(-1)[:1]
    return probs.cumsum(-1)


def pick(weights: Tensor, noise: Tensor | None = None) -> list[int]:
    """The token of each row under coupled randomness: argmax of weights / noise.

    Args:
        weights: float32 [R, V]; probabilities, or without noise whatever ranks the tokens.
        noise: float32 [R, V], above 0 (`rng.exponentials`).

    Returns:
        R token ids, INVALID for rows that are no distribution.
    """
    best = (weights if noise is None else weights / noise).max(-1)
    valid = best.values.isfinite()
    if noise is not None:
        valid &= best.values > 0
    return torch.where(valid, best.indices, INVALID).tolist()


def verify_picks(
    picks: Sequence[int], token_ids: Sequence[int], lengths: Sequence[int]
) -> list[Verdict]:
    """Decide windows of coupled proposals: accepted iff equal to the target's own picks.

    Args:
        picks: of the target, one for each row.
        token_ids: the proposed token of each row.
        lengths: rows of each window, in order.
    """
    is_accepted = [pick == token for pick, token in zip(picks, token_ids, strict=True)]
    counts = _num_accepted(is_accepted, lengths)
    return _verdicts(counts, lengths, [picks[row] for row in _rejected_rows(counts, lengths)])


def verify(
    target: Tensor,
    proposal: Tensor,
    token_ids: Sequence[int],
    lengths: Sequence[int],
    accept_uniforms: Tensor,
    recover_uniforms: Tensor,
) -> list[Verdict]:
    """Decide windows of proposed tokens, several sequences at once.

    Args:
        target: r of each row, float32 [R, V].
        proposal: g of each row, float32 [R, V].
        token_ids: the proposed token of each row, [R].
        lengths: rows of each window, in order; they sum to R.
        accept_uniforms: float32 [R], decide acceptance.
        recover_uniforms: float32 [R], draw the recovered tokens.

    Returns:
        One verdict for each window.
    """
    tokens = tensor_on(target.device, token_ids)[:, None]
    r, g = target.gather(1, tokens)[:, 0], proposal.gather(1, tokens)[:, 0]
    # Comparisons with NaN are false: a broken row is rejected, and sampling it yields INVALID.
    is_accepted: list[bool] = (accept_uniforms * g < r).tolist()
    counts = _num_accepted(is_accepted, lengths)
    rows = _rejected_rows(counts, lengths)
    return _verdicts(counts, lengths, _recover(target, proposal, rows, recover_uniforms))


def verify_blocks(
    target: Tensor,
    proposal: Tensor,
    token_ids: Sequence[int],
    lengths: Sequence[int],
    accept_uniforms: Tensor,
    recover_uniforms: Tensor,
) -> list[Verdict]:
    """`verify`, with each window decided as a block; the same arguments and results."""
    tests, carry = block_tests(target, proposal, token_ids, lengths)
    passed = [u < h for u, h in zip(accept_uniforms.tolist(), tests, strict=True)]
    counts = [
        max((row - start + 1 for row in range(start, end) if passed[row]), default=0)
        for start, end in pairwise(accumulate(lengths, initial=0))
    ]
    rows = _rejected_rows(counts, lengths)
    return _verdicts(counts, lengths, _recover(target, proposal, rows, recover_uniforms, carry))


def block_tests(
    target: Tensor, proposal: Tensor, token_ids: Sequence[int], lengths: Sequence[int]
) -> tuple[list[float], Tensor]:
    """The tests of block verification (h) and what they rest on (p); arguments as for `verify`.

    A row that is no distribution ends its block, so that it is met as often as by `verify`; which
    rows are depends on the tokens before them only.

    Returns:
        For each row, the probability of the test that keeps its window up to and including it; and
        [R], in the target's dtype, p of the tokens of the window before it.
    """
    tokens = tensor_on(target.device, token_ids)[:, None]
    # 0 / 0 is a token that neither gives anything to: not accepted, like by `verify`.
    odds = target.gather(1, tokens) / proposal.gather(1, tokens)
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


def _num_accepted(is_accepted: list[bool], lengths: Sequence[int]) -> list[int]:
    """Rows of each window before its first rejection."""
    return [
        next((row - start for row in range(start, end) if not is_accepted[row]), end - start)
        for start, end in pairwise(accumulate(lengths, initial=0))
    ]


def _rejected_rows(counts: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """The row that ends each window which isn't accepted whole."""
    starts = accumulate(lengths, initial=0)
    return [
        start + count
        for start, count, length in zip(starts, counts, lengths, strict=False)
        if count < length
    ]


def _verdicts(
    counts: Sequence[int], lengths: Sequence[int], recovered: Iterable[int]
) -> list[Verdict]:
    """One for each window; `recovered` holds the tokens of those not accepted whole, in order."""
    tokens = iter(recovered)
    return [
        Verdict(count, next(tokens) if count < length else None)
        for count, length in zip(counts, lengths, strict=True)
    ]


def _recover(
    target: Tensor,
    proposal: Tensor,
    rows: list[int],
    uniforms: Tensor,
    carry: Tensor | None = None,
) -> list[int]:
    """Draw from norm(max(0, carry * r - g)) for each of `rows`; `carry` [R] is 1 if not given."""
    if not rows:
        return []
    index = tensor_on(target.device, rows)
    r = target.index_select(0, index)
    carried = r if carry is None else carry.index_select(0, index)[:, None] * r
    residual = (carried - proposal.index_select(0, index)).clamp_min_(0)
    # Rounding alone can reject a token where r equals g; nothing is left over then but r itself.
    is_empty = residual.sum(-1, keepdim=True) <= 0
    return sample(torch.where(is_empty, r, residual), uniforms.index_select(0, index))

"""Combining the members' scores into the target distribution r (paper section 3, eq. 5).

weighted:  r = sum_k w_k softmax(warp(l_k)): each member is warped before mixing, so that drawing
           a model by its weight and then a token from that model is the same law.
logits:    r = softmax(warp(sum_k w_k l_k)): contrastive decoding (weights 1 and -mu) and every
           other linear mix. Tokens that are improbable to a reference model beside the most
           probable one may be left out (plausibility, Li et al. 2023): of those that the request
           allows at all, or a text of a given form could find none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from server.core.combination import Combination
from server.decoding.warp import Warp

Scores = Callable[[int], Tensor]  # model -> its raw logits of the rows at hand, float32 [R, V]

# Where a negatively weighted member gives a token probability zero, its logit counts as this.
_FLOOR = -1e4


def combine(scores: Scores, combination: Combination, warp: Warp) -> Tensor:
    """The target distribution r, float32 [R, V]; greedy rows' is that at temperature 1."""
    if combination.is_logit_level:
        return warp.probs(mix_logits(scores, combination, warp))
    return _mix_probs(scores, combination, warp)


def rank(scores: Scores, combination: Combination, warp: Warp) -> Tensor:
    """Something that ranks tokens as r does, float32 [R, V]: its argmax is the greedy token.

    For greedy rows only: what they take from the logits needs no softmax.
    """
    if combination.is_logit_level:
        return warp(mix_logits(scores, combination, warp))
    if len(combination.scorers) == 1:
        return warp(scores(combination.scorers[0]))
    return _mix_probs(scores, combination, warp)


def log_combined(scores: Scores, combination: Combination, warp: Warp | None = None) -> Tensor:
    """Logarithm of r without any warp, float32 [R, V]: what `logprobs` reports.

    Of `warp` no more is taken than beside which tokens others are plausible; see `mix_logits`.
    """
    if combination.is_logit_level:
        return mix_logits(scores, combination, warp).log_softmax(-1)
    parts = [
        scores(model).log_softmax(-1) + torch.tensor(combination.weights[model]).log().item()
        for model in combination.scorers
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).logsumexp(0)


def _mix_probs(scores: Scores, combination: Combination, warp: Warp) -> Tensor:
    """sum_k w_k softmax(warp(l_k)), float32 [R, V]."""
    total: Tensor | None = None
    for model in combination.scorers:
        part = warp.probs(scores(model))
        weight = combination.weights[model]
        if total is None:
            total = part if weight == 1 else part.mul_(weight)
        else:
            total.add_(part, alpha=weight)
    assert total is not None
    return total


def mix_logits(scores: Scores, combination: Combination, warp: Warp | None = None) -> Tensor:
    """sum_k w_k l_k with the plausibility mask, float32 [R, V]; not to be written to.

    Plausible are tokens beside those that `warp` allows, or beside all. A token to which a
    positively weighted member gives probability zero has probability zero.
    """
    total: Tensor | None = None
    for model in combination.scorers:
        weight = combination.weights[model]
        logits = scores(model)
        if weight < 0:
            logits = logits.clamp_min(_FLOOR)
        if total is not None:
            total = total.add(logits, alpha=weight)
        else:
            total = logits if weight == 1 else logits * weight
    assert total is not None
    if combination.plausibility > 0:
        total = total.masked_fill(_implausible(scores, combination, warp), -torch.inf)
    return total


def _implausible(scores: Scores, combination: Combination, warp: Warp | None) -> Tensor:
    """Tokens with p(x) < alpha * max p under the reference model, bool [R, V]."""
    logits = scores(combination.reference)
    compared = logits if warp is None else warp.forbid(logits)
    alpha = torch.tensor(combination.plausibility)  # a number for every device
    return logits < compared.amax(-1, keepdim=True) + alpha.log()

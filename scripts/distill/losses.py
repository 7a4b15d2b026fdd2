"""What the proposer is trained on: the expert's distribution, on a sample of the vocabulary.

The whole head costs more than a few layers do. A batch is therefore scored on a fixed shortlist of
frequent tokens and a fresh sample of the others, whose logits are raised by the log of how rarely
they are drawn: both softmax normalisers, and so both distributions, become estimates of the full
ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 128  # scored at once; 6,144 tokens of the vocabulary take 3 MB


@dataclass(frozen=True, slots=True)
class LossWeights:
    kl: float = 1.0
    variation: float = 1.0
    state: float = 1.0


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Rows of the head for one batch, and what to add to their logits."""

    weight: Tensor  # [num_sampled, hidden_size]
    correction: Tensor  # [num_sampled]


class VocabularySampler:
    """Draws the vocabulary of a batch: the `frequent` ids and `num_rare` of the others."""

    def __init__(self, head: Tensor, frequent: Tensor, num_rare: int) -> None:
        """Head [vocab, hidden_size], frequent [n] token ids without repetition."""
        is_rare = torch.ones(len(head), dtype=torch.bool, device=head.device)
        is_rare[frequent] = False
        self._head = head
        self._frequent_rows = head[frequent]
        self._rare = is_rare.nonzero().squeeze(1)
        self._num_rare = min(num_rare, len(self._rare))

    def draw(self, generator: torch.Generator) -> Vocabulary:
        correction = self._head.new_zeros(len(self._frequent_rows) + self._num_rare)
        if not self._num_rare:
            return Vocabulary(self._frequent_rows, correction)
        order = torch.randint(len(self._rare), (self._num_rare,), generator=generator)
        rare = self._rare[order.to(self._rare.device)]
        correction[len(self._frequent_rows) :] = math.log(len(self._rare) / self._num_rare)
        return Vocabulary(torch.cat([self._frequent_rows, self._head[rare]]), correction)


def distillation_loss(
    student: Tensor, expert: Tensor, vocabulary: Vocabulary, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """Hidden states [tokens, hidden_size] of both -> (loss, overlap), means over the tokens."""
    scores, variation = _ScoreLoss.apply(student, expert, vocabulary, weights)
    state = 1 - F.cosine_similarity(student.float(), expert.float(), dim=-1).mean()
    return scores + weights.state * state, 1 - variation


class _ScoreLoss(torch.autograd.Function):
    """Cross-entropy and total variation of the two distributions; their gradient by hand.

    With the gradient ready in the forward, a block of rows stays in the processor's cache for all
    it takes, and no [tokens, vocabulary] tensor outlives its block. With q the student's
    distribution and s = sign(q - p) / 2 the gradient at the student's logits is q - p for the
    cross-entropy and q (s - Σ q s) for the total variation.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, expert: Tensor, vocabulary: Vocabulary, weights: LossWeights
    ) -> tuple[Tensor, Tensor]:
        gradients = []
        cross_entropy, variation = student.new_zeros(2, dtype=torch.float32)
        for ours, theirs in zip(student.split(ROWS), expert.split(ROWS), strict=True):
            p = _logits(theirs, vocabulary).softmax(-1)
            log_q = _logits(ours, vocabulary).log_softmax(-1)
            cross_entropy -= torch.linalg.vecdot(p.flatten(), log_q.flatten())
            q = log_q.exp_()
            gap = q - p
            variation += 0.5 * gap.abs().sum()
            pull = gap.sign().mul_(0.5)
            pull -= torch.linalg.vecdot(q, pull)[:, None]
            gap.mul_(weights.kl).addcmul_(q, pull, value=weights.variation)
            weight = vocabulary.weight
            gradients.append(gap.to(weight.dtype) @ weight)
        count = len(student)
        ctx.save_for_backward(torch.cat(gradients).to(student.dtype) / count)
        variation /= count
        ctx.mark_non_differentiable(variation)
        return weights.kl * cross_entropy / count + weights.variation * variation, variation

    @staticmethod
    def backward(ctx: Any, loss: Tensor, variation: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * loss, None, None, None


def _logits(hidden: Tensor, vocabulary: Vocabulary) -> Tensor:
    weight = vocabulary.weight
    return F.linear(hidden.to(weight.dtype), weight).float() + vocabulary.correction


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """Σ min(p, q) of each row: p, q [rows, vocab] -> [rows]."""
    return torch.minimum(p, q).sum(-1)

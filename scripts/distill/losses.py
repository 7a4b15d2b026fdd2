"""What the proposer is trained on: the expert's distribution, on a sample of the vocabulary.

The whole head costs more than a few layers do. A batch is therefore scored on a fixed shortlist of
frequent tokens and a fresh sample of the others, whose logits are raised by the log of how rarely
they are drawn: both softmax normalisers, and so both distributions, become estimates of the full
ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


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
    with torch.no_grad():
        p = F.log_softmax(_logits(expert, vocabulary), -1).exp()
    log_q = F.log_softmax(_logits(student, vocabulary), -1)
    cross_entropy = -(p * log_q).sum(-1).mean()
    variation = 0.5 * (p - log_q.exp()).abs().sum(-1).mean()
    state = 1 - F.cosine_similarity(student.float(), expert.float(), dim=-1).mean()
    loss = weights.kl * cross_entropy + weights.variation * variation + weights.state * state
    return loss, 1 - variation.detach()


def _logits(hidden: Tensor, vocabulary: Vocabulary) -> Tensor:
    return F.linear(hidden, vocabulary.weight.to(hidden.dtype)).float() + vocabulary.correction


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """Σ min(p, q) of each row: p, q [rows, vocab] -> [rows]."""
    return torch.minimum(p, q).sum(-1)

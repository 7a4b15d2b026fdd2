"""How member scores become one distribution, as data; the tensor code is decoding/combine.py."""

from __future__ import annotations

import math
from collections.abc import Sequence as Row
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Method = Literal["weighted", "contrastive", "linear"]

# Models are combined in float32, which holds little less, and takes it for 0.
_LEAST_WEIGHT = 1e-30


@dataclass(frozen=True)
class Combination:
    """Weights of one combination over the configured models.

    weighted:                r = sum_k weights[k] * softmax(warp(l_k))      (probability level)
    contrastive and linear:  r = softmax(warp(sum_k weights[k] * l_k))      (logit level)

    A model of weight zero is never a scorer: the combination does not pay for it. Weights of less
    than 1e-30 are taken for zero.

    Attributes:
        method: what the client asked for.
        weights: one for each model.
        plausibility: alpha of Li et al. 2023: tokens with p(x) < alpha * max p of the
            `reference` model get probability zero. 0 switches it off.
        reference: index of the model that judges plausibility (the expert).
    """

    method: Method
    weights: tuple[float, ...]
    plausibility: float = 0.0
    reference: int = 0

    @classmethod
    def weighted(cls, weights: Row[float]) -> Combination:
        """Raises ValueError unless the weights are non-negative and sum to 1."""
        _check_finite(weights)
        if any(weight < 0 for weight in weights):
            raise ValueError(f"weights must not be negative, got {list(weights)}")
        if not math.isclose(total := math.fsum(weights), 1.0, abs_tol=1e-6):
            raise ValueError(f"weights must sum to 1, got {list(weights)} (sum {total:g})")
        return cls("weighted", tuple(_flushed(weight / total) for weight in weights))

    @classmethod
    def contrastive(cls, num_models: int, mu: float, plausibility: float = 0.0) -> Combination:
        """Paper eq. 5: l_p - mu * l_q with the last model as expert p, the first as amateur q.

        Models between them get weight zero: they may propose, they do not score.
        Raises ValueError for fewer than two models.
        """
        if num_models < 2:
            raise ValueError("contrastive needs at least two models")
        _check_finite((mu, plausibility))
        weights = (_flushed(-mu), *[0.0] * (num_models - 2), 1.0)
        return cls("contrastive", weights, plausibility, reference=num_models - 1)

    @classmethod
    def linear(cls, weights: Row[float]) -> Combination:
        """Raises ValueError when all weights are zero."""
        _check_finite(weights)
        flushed = tuple(map(_flushed, weights))
        if not any(flushed):
            raise ValueError("at least one weight must not be zero")
        return cls("linear", flushed)

    @classmethod
    def only(cls, num_models: int, model: int) -> Combination:
        """The distribution of one model alone."""
        return cls("weighted", tuple(float(k == model) for k in range(num_models)))

    @cached_property
    def scorers(self) -> tuple[int, ...]:
        """Models whose score a position needs, in proposal order."""
        return tuple(k for k, weight in enumerate(self.weights) if weight != 0)

    @property
    def is_logit_level(self) -> bool:
        """True where logits are mixed before the softmax, False where probabilities are."""
        return self.method != "weighted"


def _flushed(weight: float) -> float:
    return 0.0 if abs(weight) < _LEAST_WEIGHT else float(weight)


def _check_finite(values: Row[float]) -> None:
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values must be finite, got {list(values)}")

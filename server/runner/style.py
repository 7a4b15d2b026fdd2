"""How a layer scores keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Style:
    """How a layer scores: `softcap * tanh(scale * q.k / softcap)` within `window` tokens.

    Attributes:
        scale: of q.k; None: one over the root of the head dimension.
        window: how many tokens back a query sees, itself included; 0: all.
        softcap: bound of the scores, or None.
        sinks: [heads] scores of a key without value that every query also sees, or None.
    """

    scale: float | None
    window: int
    softcap: float | None
    sinks: Tensor | None

    def scale_for(self, dim: int) -> float:
        """The scale, for heads of so many numbers."""
        return dim**-0.5 if self.scale is None else self.scale

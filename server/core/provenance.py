"""Where a generated token came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TokenOutcome = Literal["accepted", "bonus", "recovered", "drawn", "forced"]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Of one verified token.

    Attributes:
        model: index of who proposed there, LOOKUP for prompt lookup; None where nobody did.
        outcome: the proposal was accepted; it was a bonus, and accepted; it was rejected, and
            this token drawn instead; there was none, and the token was drawn; or it was the only
            one that the form allowed.
    """

    model: int | None
    outcome: TokenOutcome

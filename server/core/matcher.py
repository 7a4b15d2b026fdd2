"""What the engine asks of a grammar that a text must follow; `decoding.grammar` implements it."""

from __future__ import annotations

from collections.abc import Sequence as Row
from typing import Protocol


class Matcher(Protocol):
    """Follows one sequence. Answers depend on the tokens given alone, whatever was asked before."""

    @property
    def error(self) -> str | None:
        """Why no token is allowed any more, where the grammar became too complex to follow."""
        ...

    def mask(self, generated: Row[int]) -> bytes:
        """Tokens that may follow `generated`: bit i % 8 of byte i // 8 for token i."""
        ...

    def end(self, generated: Row[int]) -> int | None:
        """How many tokens of `generated` complete the text, so that nothing may follow."""
        ...

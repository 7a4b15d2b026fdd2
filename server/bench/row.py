"""What one request gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class RequestFailed(Exception):
    """One request went wrong; the message goes into its row."""


@dataclass(slots=True)
class Row:
    """One request, sent and read to its end. Times are in seconds.

    Attributes:
        prompt_set, concurrency, strategy, round, index, seed: which request it was.
        error: what went wrong, or None.
        started: since the run began.
        duration: until the end of the stream.
        ttft: until the first chunk that brought a token.
        num_prompt_tokens, num_tokens: as the server reports them.
        first_tokens: tokens that the first of those chunks brought.
        gaps: (time since the chunk before, tokens in this chunk), for each later chunk.
        cos: the server's own account of how it decoded the request.
    """

    prompt_set: str
    concurrency: int
    strategy: str
    round: int
    index: int
    seed: int
    error: str | None = None
    started: float = 0.0
    duration: float = 0.0
    ttft: float | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    first_tokens: int = 0
    gaps: list[tuple[float, int]] = field(default_factory=list)
    cos: dict[str, Any] = field(default_factory=dict)

    @property
    def decode_seconds(self) -> float:
        """From the first chunk to the last one that brought a token."""
        return sum(seconds for seconds, _ in self.gaps)

    @property
    def num_decoded(self) -> int:
        """Tokens that decode_seconds paid for."""
        return sum(count for _, count in self.gaps)

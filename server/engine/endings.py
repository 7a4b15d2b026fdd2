"""Where and why a text ends."""

from __future__ import annotations

from dataclasses import dataclass

from server.core.output import FinishReason
from server.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class End:
    """Where and why a text ends: after `num_tokens` of the newly verified tokens."""

    num_tokens: int
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    by_token: bool = False  # the last one says so and is no part of the text


def find_end(sequence: Sequence, new: list[int], eos_token_ids: frozenset[int]) -> End | None:
    """The first stop token, what completes the grammar, or the last that max_tokens allows."""
    params = sequence.params
    generated = sequence.num_generated - len(new)
    complete = _complete(sequence)
    for count, token_id in enumerate(new, start=1):
        if generated + count > params.min_tokens:
            if token_id in params.stop_token_ids:
                return End(count, "stop", token_id, by_token=True)
            if token_id in eos_token_ids and not params.ignore_eos:
                return End(count, "stop", by_token=True)
        if generated + count == complete:
            return End(count, "stop", by_token=token_id in eos_token_ids)
        if generated + count == params.max_tokens:
            return End(count, "length")
    return None


def _complete(sequence: Sequence) -> int | None:
    """Generated tokens that complete the sequence's grammar, if it has one and they do."""
    if sequence.matcher is None:
        return None
    return sequence.matcher.end(sequence.token_ids[sequence.num_prompt : sequence.num_verified])


def grammar_error(sequence: Sequence) -> str | None:
    return None if sequence.matcher is None else sequence.matcher.error

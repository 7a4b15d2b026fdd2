"""What clients are told of sequences: their new text, where it ends, and why."""

from __future__ import annotations

from collections.abc import Iterable

from server.core.output import TokenDelta, TokenLogprob
from server.core.sampling_params import DecodingParams
from server.core.sequence import Sequence
from server.core.stats import Delivery, Fault, StepStats
from server.engine.detokenizer import Decoder, TextStream
from server.engine.endings import End, find_end, grammar_error

_REASONS: dict[Fault, str] = {
    "invalid_scores": "a model returned NaN, or gives no probability to any token that this "
    "request allows",
    "internal": "an internal error in this request's path",
    "out_of_memory": "the server has not enough memory for this request",
}


class Outputs:
    """Of the sequences that are in the engine; it ends none of them."""

    def __init__(self, decoder: Decoder, eos_token_ids: frozenset[int]) -> None:
        self._decoder = decoder
        self._eos_token_ids = eos_token_ids
        self._texts: dict[Sequence, TextStream] = {}
        self._prompt_logprobs: dict[Sequence, list[TokenLogprob]] = {}

    def add(self, sequence: Sequence) -> None:
        """One of which nothing was told yet."""
        self._texts[sequence] = TextStream(self._decoder, sequence.token_ids, sequence.params)

    def remove(self, sequence: Sequence) -> None:
        """Nothing more is told of it."""
        del self._texts[sequence]
        self._prompt_logprobs.pop(sequence, None)

    def add_prompt_logprobs(self, sequence: Sequence, entries: Iterable[TokenLogprob]) -> None:
        """To be told with what comes next."""
        self._prompt_logprobs.setdefault(sequence, []).extend(entries)

    def goes_on(self, sequence: Sequence, count: int) -> bool:
        """Is it sure, before its last `count` tokens are text, that none of them ends it?"""
        params = sequence.params
        if params.stop or sequence.matcher is not None:
            return False
        if sequence.num_generated >= params.max_tokens:
            return False
        new = sequence.token_ids[sequence.num_verified - count : sequence.num_verified]
        return self._eos_token_ids.isdisjoint(new) and params.stop_token_ids.isdisjoint(new)

    def deliver(
        self,
        sequence: Sequence,
        schedule: DecodingParams,
        count: int,
        num_forced: int,
        logprobs: list[TokenLogprob],
        stats: StepStats,
    ) -> TokenDelta:
        """Its last `count` verified tokens as text, as far as that goes; counts what is told.

        Args:
            sequence: whose tokens they are.
            schedule: how they were decoded.
            count: of the tokens.
            num_forced: how many of them, the last ones, were forced.
            logprobs: of each of them, or none.
            stats: of the step that verified them.
        """
        start = sequence.num_verified - count
        new = sequence.token_ids[start : start + count]
        text, end = self._show(sequence, new)
        kept = end.num_tokens if end is not None else count
        used = schedule.strategy
        sequence.stats.strategies[used] = sequence.stats.strategies.get(used, 0) + kept
        is_first, num_decided = start == sequence.num_prompt, count - num_forced
        stats.deliveries.append(Delivery(schedule, kept, is_first, max(0, kept - num_decided)))
        stats.num_discarded += count - kept
        return TokenDelta(
            sequence_id=sequence.id,
            token_ids=tuple(new[:kept]),
            text=text,
            logprobs=tuple(logprobs[:kept]),
            prompt_logprobs=tuple(self._prompt_logprobs.pop(sequence, ())),
            provenance=tuple(sequence.take_provenance()[:kept]),
            finish_reason=end.finish_reason if end is not None else None,
            stop_reason=end.stop_reason if end is not None else None,
            stats=sequence.stats if end is not None else None,
            num_cached=_num_cached(sequence),
        )

    def end_at_prompt(self, sequence: Sequence) -> TokenDelta:
        """Nothing was to be generated: the prompt's log-probabilities are all."""
        return TokenDelta(
            sequence_id=sequence.id,
            prompt_logprobs=tuple(self._prompt_logprobs.pop(sequence, ())),
            finish_reason="length",
            stats=sequence.stats,
        )

    def fail(self, sequence: Sequence, fault: Fault) -> TokenDelta:
        """It cannot go on."""
        position = sequence.num_verified - sequence.num_prompt
        reason = grammar_error(sequence) or _REASONS[fault]
        return TokenDelta(
            sequence_id=sequence.id,
            finish_reason="error",
            stats=sequence.stats,
            error=f"token {position} cannot be drawn: {reason}",
        )

    def _show(self, sequence: Sequence, new: list[int]) -> tuple[str, End | None]:
        """Detokenise `new`, and find whether the text ends among them."""
        end = find_end(sequence, new, self._eos_token_ids)
        shown = new[: end.num_tokens] if end is not None else new
        if end is not None and end.by_token and not sequence.params.include_stop:
            shown = shown[:-1]
        stream = self._texts[sequence]
        text, match = stream.push(shown)
        if match is not None:
            return text, End(match.num_tokens, "stop", match.stop)
        if end is None:
            return text, None
        rest, match = stream.flush()
        if match is not None:
            end = End(end.num_tokens, "stop", match.stop)
        return text + rest, end


def _num_cached(sequence: Sequence) -> int:
    """Prompt tokens that no model had to read at first."""
    # Of models that have read any of it, though it may have been preempted since.
    read = map(max, sequence.num_seen, sequence.resume_at)
    found = [cached for cached, until in zip(sequence.stats.cached, read, strict=True) if until > 0]
    return min(min(found, default=0), sequence.num_prompt)

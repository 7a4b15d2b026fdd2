"""From the engine's deltas to what a client gets: choices, usage, the report of decoding."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence as Row
from contextlib import aclosing
from typing import cast

from server.api.codec import Codec
from server.api.decoding import describe_combination
from server.api.generation import Generation
from server.api.logprobs import LogprobsWriter, join
from server.api.protocol import CompletionChoice, CosReport, Usage
from server.api.service import Service
from server.core.output import TokenDelta
from server.core.sequence import SequenceStats
from server.errors import GenerationFailed
from server.metrics import RequestObserver

logger = logging.getLogger(__name__)

DeltaStream = AsyncGenerator[list[TokenDelta]]


class Reply:
    """What has come so far for one request."""

    def __init__(self, generation: Generation, codec: Codec) -> None:
        self._generation = generation
        self._indices = {s.id: index for index, s in enumerate(generation.sequences)}
        self._logprobs = [LogprobsWriter(codec) for _ in generation.sequences]
        self._stats: list[SequenceStats] = []
        self._finish_reasons: set[str] = set()
        self._num_tokens = 0

    def take(self, delta: TokenDelta) -> CompletionChoice:
        """Count a delta that is no failure, and give it the client's shape."""
        assert delta.finish_reason not in ("error", "cancelled")
        index = self._indices[delta.sequence_id]
        self._num_tokens += len(delta.token_ids)
        if delta.stats is not None:
            self._stats.append(delta.stats)
        if delta.finish_reason is not None:
            self._finish_reasons.add(delta.finish_reason)
        wants_logprobs = self._generation.sequences[index].params.logprobs is not None
        return CompletionChoice(
            index=index,
            text=delta.text,
            logprobs=self._logprobs[index].write(delta.logprobs) if wants_logprobs else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )

    @property
    def id(self) -> str:
        return self._generation.id

    def index(self, delta: TokenDelta) -> int:
        return self._indices[delta.sequence_id]

    @property
    def finish_reason(self) -> str:
        """Of the request: "stop" where every choice stopped by itself."""
        return "length" if "length" in self._finish_reasons else "stop"

    def usage(self) -> Usage:
        num_prompt = self._generation.num_prompt_tokens
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self._num_tokens,
            total_tokens=num_prompt + self._num_tokens,
        )

    def report(self) -> CosReport:
        """Sums over all choices that have finished."""
        decoding, stats = self._generation.decoding, self._stats
        is_mixture = decoding.strategy == "mixture"
        by_model = range(len(decoding.gamma))
        return CosReport(
            strategy=decoding.strategy,
            combination=describe_combination(decoding.combination),
            gamma=list(decoding.gamma),
            kappa=decoding.kappa if is_mixture else None,
            shared_coins=decoding.shared_coins if is_mixture else None,
            proposed=[sum(each.proposed[k] for each in stats) for k in by_model],
            accepted=[sum(each.accepted[k] for each in stats) for k in by_model],
            forwards=[sum(each.forwards[k] for each in stats) for k in by_model],
            recovered=sum(each.num_recovered for each in stats),
            drawn=sum(each.num_drawn for each in stats),
            bonus=sum(each.num_bonus for each in stats),
            discarded=sum(each.num_discarded for each in stats),
            preemptions=sum(each.num_preemptions for each in stats),
        )


async def decode(
    generation: Generation, reply: Reply, service: Service, endpoint: str
) -> DeltaStream:
    """Decode all sequences of a request; closing the generator aborts what is left.

    The consumer must let `reply` take each delta before it asks for more.

    Raises:
        GenerationFailed: one sequence has failed, and with it the request.
        EngineError: the engine took nothing, or failed on the way.
    """
    observed = service.metrics.request(endpoint, generation.num_prompt_tokens)
    try:
        with observed:
            stream = cast(DeltaStream, service.engine.stream(generation.sequences))
            async with aclosing(stream):
                async for deltas in stream:
                    for delta in deltas:
                        if delta.finish_reason in ("error", "cancelled"):
                            raise GenerationFailed(delta.error or "the request was cancelled")
                        observed.tokens(reply.index(delta), len(delta.token_ids))
                    yield deltas
            observed.finish(reply.finish_reason)
    finally:
        _log_end(generation.id, observed, reply)


def _log_end(completion_id: str, observed: RequestObserver, reply: Reply) -> None:
    """One line for each request; never its text."""
    usage = reply.usage()
    logger.info(
        "%s %s: %d prompt and %d generated tokens in %.2f s",
        completion_id,
        observed.reason,
        usage.prompt_tokens,
        usage.completion_tokens,
        observed.seconds,
    )


def merge(index: int, parts: Row[CompletionChoice]) -> CompletionChoice:
    """The whole choice from its pieces."""
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return CompletionChoice(
        index=index,
        text="".join(part.text for part in parts),
        logprobs=join(logprobs) if logprobs else None,
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason,
    )

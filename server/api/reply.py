"""From the engine's deltas to the pieces of a reply, its usage and its report of decoding."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence as Row
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal

from server.api.clients import Client
from server.api.decoding import describe_combination
from server.api.generation import Generation
from server.api.protocol import CosReport, LookupReport, PromptTokensDetails, Usage
from server.api.service import Service
from server.core.output import TokenDelta, TokenLogprob
from server.core.provenance import Provenance
from server.core.sequence import SequenceStats
from server.errors import EngineDraining, EngineOverloaded, GenerationFailed
from server.metrics import RequestObserver
from server.tracing import FinishedRequest

logger = logging.getLogger(__name__)

DeltaStream = AsyncGenerator[list[TokenDelta]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of one choice, or all of it.

    Attributes:
        index: of the choice.
        text: empty where all of it is held back for now.
        token_ids: may be more than the text's, or fewer: text is held back, tokens are not.
        logprobs: one for each token; None where none were asked for.
        provenance: one for each token; None where it was not asked for.
        prompt_logprobs: of the prompt from its second token on; on the first piece of a choice.
        finish_reason: set on the last piece of a choice.
        stop_reason: the stop string or stop token that ended the text.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    provenance: tuple[Provenance, ...] | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class Reply:
    """What has come so far for one request."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._indices = {s.id: index for index, s in enumerate(generation.sequences)}
        self._stats: list[SequenceStats] = []
        self._finish_reasons: set[str] = set()
        self._num_tokens = 0
        self._num_cached: dict[int, int] = {}  # by prompt

    def take(self, delta: TokenDelta) -> Piece:
        """Count a delta that is no failure."""
        assert delta.finish_reason != "error"
        index = self._indices[delta.sequence_id]
        self._num_tokens += len(delta.token_ids)
        self._count_cached(index // self._generation.num_choices, delta.num_cached)
        if delta.stats is not None:
            self._stats.append(delta.stats)
        if delta.finish_reason is not None:
            self._finish_reasons.add(delta.finish_reason)
        params = self._generation.sequences[index].params
        return Piece(
            index=index,
            text=delta.text,
            token_ids=delta.token_ids,
            logprobs=delta.logprobs if params.logprobs is not None else None,
            provenance=delta.provenance if params.provenance else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            prompt_logprobs=delta.prompt_logprobs,
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
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached.values())),
        )

    def _count_cached(self, prompt: int, num_cached: int) -> None:
        """Of several choices, those that came later found what the first one read."""
        self._num_cached[prompt] = min(self._num_cached.get(prompt, num_cached), num_cached)

    def report(self) -> CosReport:
        """Sums over all choices that have finished."""
        decoding, stats = self._generation.decoding, self._stats
        cycles, verified = sum(each.num_cycles for each in stats), sum(map(_num_verified, stats))
        decode_seconds = sum(each.decode_seconds for each in stats)
        known = [s.baseline_seconds for s in stats if s.baseline_seconds is not None]
        baseline_seconds = sum(known) if known else None
        is_mixture = decoding.strategy == "mixture"
        by_model = range(len(decoding.gamma))
        strategies: Counter[str] = Counter()
        for each in stats:
            strategies.update(each.strategies)
        return CosReport(
            strategy=decoding.strategy,
            strategies=dict(strategies),
            combination=describe_combination(decoding.combination),
            gamma=list(self._generation.sequences[0].schedule.gamma),
            kappa=decoding.kappa if is_mixture else None,
            shared_coins=decoding.shared_coins if is_mixture else None,
            proposed=[sum(each.proposed[k] for each in stats) for k in by_model],
            accepted=[sum(each.accepted[k] for each in stats) for k in by_model],
            prompt_lookup=None if decoding.lookup is None else _lookups(stats),
            forwards=[sum(each.forwards[k] for each in stats) for k in by_model],
            recovered=sum(each.num_recovered for each in stats),
            drawn=sum(each.num_drawn for each in stats),
            forced=sum(each.num_forced for each in stats),
            bonus=sum(each.num_bonus for each in stats),
            discarded=sum(each.num_discarded for each in stats),
            preemptions=sum(each.num_preemptions for each in stats),
            cycles=cycles,
            verified_per_cycle=verified / cycles if cycles else None,
            decode_seconds=decode_seconds,
            baseline_seconds=baseline_seconds,
            estimated_speedup=(
                baseline_seconds / decode_seconds if baseline_seconds and decode_seconds else None
            ),
        )


def _lookups(stats: Row[SequenceStats]) -> LookupReport:
    return LookupReport(
        proposed=sum(each.num_looked_up for each in stats),
        accepted=sum(each.num_lookup_accepted for each in stats),
    )


def _num_verified(stats: SequenceStats) -> int:
    accepted = sum(stats.accepted) + stats.num_lookup_accepted
    return accepted + stats.num_recovered + stats.num_drawn


async def decode(
    generation: Generation,
    reply: Reply,
    service: Service,
    endpoint: str,
    headers: Mapping[str, str],
    client: Client,
) -> DeltaStream:
    """Decode all sequences of a request; closing the generator aborts what is left.

    `headers` are the HTTP request's: a trace may begin there.

    The consumer must let `reply` take each delta before it asks for more.

    Raises:
        GenerationFailed: one sequence has failed, and with it the request.
        EngineError: the engine took nothing, or failed on the way.
    """
    stats = [sequence.stats for sequence in generation.sequences]
    observed = service.metrics.request(endpoint, generation.num_prompt_tokens, stats)
    try:
        with observed:
            seconds = service.config.http.request_seconds
            stream = service.engine.stream(generation.sequences, seconds)
            client.charge(generation.num_prompt_tokens)
            async with aclosing(stream), _refunding(client, generation.num_prompt_tokens):
                async for deltas in stream:
                    for delta in deltas:
                        if delta.finish_reason == "error":
                            raise GenerationFailed(delta.error or "the request has failed")
                        client.charge(len(delta.token_ids))
                        observed.tokens(reply.index(delta), len(delta.token_ids))
                    yield deltas
            observed.finish(reply.finish_reason)
    finally:
        _log_end(generation.id, client.name, observed, reply)
        if service.tracer is not None:
            service.tracer.record(_finished(generation, observed, reply, service), headers)


@asynccontextmanager
async def _refunding(client: Client, num_tokens: int) -> AsyncIterator[None]:
    """Nothing is charged for a prompt that the engine did not take."""
    try:
        yield
    except (EngineOverloaded, EngineDraining):
        client.refund(num_tokens)
        raise


def _log_end(completion_id: str, client: str, observed: RequestObserver, reply: Reply) -> None:
    """One line for each request; never its text."""
    usage, report = reply.usage(), reply.report()
    fields = {
        "id": completion_id,
        "client": client,
        "endpoint": observed.endpoint,
        "reason": observed.reason,
        "strategy": report.strategy,
        "prompt_tokens": usage.prompt_tokens,
        "generated_tokens": usage.completion_tokens,
        "seconds": observed.seconds,
        "queue_seconds": observed.queue_seconds,
        "first_token_seconds": observed.first_token_seconds,
        "proposed": report.proposed,
        "accepted": report.accepted,
    }
    logger.info(
        "%s %s: %d prompt and %d generated tokens in %.2f s",
        completion_id,
        observed.reason,
        usage.prompt_tokens,
        usage.completion_tokens,
        observed.seconds,
        extra={"fields": fields},
    )


def _finished(
    generation: Generation, observed: RequestObserver, reply: Reply, service: Service
) -> FinishedRequest:
    usage = reply.usage()
    return FinishedRequest(
        endpoint=observed.endpoint,
        model=service.config.served_model_name,
        reason=observed.reason,
        ended=observed.ended,
        seconds=observed.seconds,
        queue_seconds=observed.queue_seconds,
        first_token_seconds=observed.first_token_seconds,
        attributes={
            "gen_ai.response.id": generation.id,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "cos.strategy": generation.decoding.strategy,
        },
    )


class PromptScores:
    """Those of a prompt, which come with its first choice, for the first piece of each other."""

    def __init__(self, num_prompts: int, num_choices: int) -> None:
        self._num_choices = num_choices
        self._num_sequences = num_prompts * num_choices
        self._scores: dict[int, tuple[TokenLogprob, ...]] = {}  # by prompt
        self._held: dict[int, list[Piece]] = {}  # by prompt: what came before its first choice
        self._has_begun: set[int] = set()

    @property
    def are_told(self) -> bool:
        """Every choice has them."""
        return len(self._scores) + len(self._has_begun) == self._num_sequences

    def share(self, piece: Piece) -> list[Piece]:
        """What can go out now that `piece` has come."""
        prompt, choice = divmod(piece.index, self._num_choices)
        if choice == 0 and prompt not in self._scores:
            self._scores[prompt] = piece.prompt_logprobs
            return [piece, *map(self._scored, self._held.pop(prompt, ()))]
        if prompt not in self._scores:
            self._held.setdefault(prompt, []).append(piece)
            return []
        return [piece if choice == 0 else self._scored(piece)]

    def _scored(self, piece: Piece) -> Piece:
        if piece.index in self._has_begun:
            return piece
        self._has_begun.add(piece.index)
        return replace(piece, prompt_logprobs=self._scores[piece.index // self._num_choices])


def merge(pieces: Row[Piece]) -> Piece:
    """The whole choice."""
    last = pieces[-1]
    logprobs = [entry for piece in pieces for entry in piece.logprobs or ()]
    provenance = [entry for piece in pieces for entry in piece.provenance or ()]
    return Piece(
        index=last.index,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
        logprobs=None if last.logprobs is None else tuple(logprobs),
        provenance=None if last.provenance is None else tuple(provenance),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_logprobs=pieces[0].prompt_logprobs,
    )

"""Answers an accepted request, whole or as a stream, in whatever shape its endpoint writes."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence as Row
from contextlib import aclosing
from dataclasses import replace
from typing import Any, ClassVar

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from server.api.clients import client_of
from server.api.disconnect import ClientDisconnected, while_connected
from server.api.errors import describe
from server.api.generation import Generation
from server.api.middleware import CLIENT_GONE
from server.api.protocol import GenerationRequest, ReplyBody, StreamOptions, TokenProvenance
from server.api.reply import DeltaStream, Piece, PromptScores, Reply, decode, merge
from server.api.service import Service
from server.api.sse import DONE, EventStream, event
from server.config import LOOKUP_NAME
from server.core.output import TokenDelta
from server.core.provenance import Provenance
from server.errors import EngineError

logger = logging.getLogger(__name__)


class Writer(ABC):
    """Bodies and chunks of one reply."""

    endpoint: ClassVar[str]  # as the metrics name it

    def __init__(
        self, request: GenerationRequest, generation: Generation, service: Service
    ) -> None:
        self.request = request
        self.generation = generation
        self.codec = service.codec
        # LOOKUP, -1, is the last.
        self._proposers = [*(model.name for model in service.config.models), LOOKUP_NAME]
        self.head: dict[str, Any] = {
            "id": generation.id,
            "created": generation.created,
            "model": service.config.served_model_name,
        }

    @abstractmethod
    def whole(self, choices: Row[Piece]) -> ReplyBody:
        """The body of a reply that is no stream, but for usage and report."""

    @abstractmethod
    def chunk(self, piece: Piece) -> ReplyBody:
        """One event of a stream."""

    @abstractmethod
    def usage_chunk(self) -> ReplyBody:
        """The event without choices that carries usage and report."""

    def opening(self) -> Iterable[ReplyBody]:
        """Events before the first piece."""
        return ()

    def is_silent(self, piece: Piece) -> bool:
        """Whether a piece has nothing to tell yet: its text is held back."""
        shows_ids = bool(self.request.return_token_ids and piece.token_ids)
        tells = piece.text or piece.finish_reason or piece.logprobs or piece.provenance or shows_ids
        return not tells

    def _provenance(self, entries: Iterable[Provenance]) -> list[TokenProvenance]:
        return [
            TokenProvenance(
                model=None if entry.model is None else self._proposers[entry.model],
                outcome=entry.outcome,
            )
            for entry in entries
        ]


async def respond(request: Request, writer: Writer, service: Service) -> Response:
    """Decode, and answer whole or in events; an early error is an exception, a late one an event.

    Raises:
        EngineError: nothing was generated.
    """
    reply = Reply(writer.generation)
    client = client_of(request)
    deltas = decode(writer.generation, reply, service, writer.endpoint, request.headers, client)
    try:
        if not writer.request.stream:
            return await while_connected(request, _whole(deltas, reply, writer))
        # Waiting for the first tokens before answering 200: early errors are real statuses.
        first = await while_connected(request, _first(deltas))
    except ClientDisconnected:
        return Response(status_code=CLIENT_GONE)
    events = _events(first, deltas, reply, writer)
    http = service.config.http
    return EventStream(events, deltas.aclose, http.ping_seconds, http.send_seconds)


async def _whole(deltas: DeltaStream, reply: Reply, writer: Writer) -> Response:
    pieces: list[list[Piece]] = [[] for _ in writer.generation.sequences]
    async with aclosing(deltas):
        async for batch in deltas:
            for delta in batch:
                piece = reply.take(delta)
                pieces[piece.index].append(piece)
    params = writer.generation.sequences[0].params
    if params.logprobs is None and params.prompt_logprobs is None:
        encoded = _encoded(pieces, reply, writer)
    else:  # may be many megabytes
        encoded = await run_in_threadpool(_encoded, pieces, reply, writer)
    return Response(encoded, media_type="application/json")


def _encoded(pieces: list[list[Piece]], reply: Reply, writer: Writer) -> str:
    """The body of `pieces` of each choice."""
    num_choices = writer.generation.num_choices
    merged = [merge(each) for each in pieces]
    # The first choice of each prompt has the scores of all (`generation`).
    scored = [merged[index - index % num_choices].prompt_logprobs for index in range(len(merged))]
    choices = [
        replace(choice, prompt_logprobs=entries)
        for choice, entries in zip(merged, scored, strict=True)
    ]
    body = writer.whole(choices)
    body.usage, body.cos = reply.usage(), reply.report()
    # Fields that were not asked for stay out.
    return body.model_dump_json(exclude_unset=True)


async def _first(deltas: DeltaStream) -> list[TokenDelta]:
    return await anext(deltas)


async def _events(
    first: list[TokenDelta], deltas: DeltaStream, reply: Reply, writer: Writer
) -> AsyncGenerator[bytes]:
    events = _Events(reply, writer)
    try:
        yield events.opening() + await events.of(first)
        async for batch in deltas:
            if encoded := await events.of(batch):
                yield encoded
        yield events.usage()
    except Exception as error:
        if not isinstance(error, EngineError):
            logger.exception("%s failed", reply.id)
        yield event(describe(error)[1])
    yield DONE


class _Events:
    """Encoded chunks of one stream, with usage where its options ask for it."""

    def __init__(self, reply: Reply, writer: Writer) -> None:
        self._reply = reply
        self._writer = writer
        self._options = writer.request.stream_options or StreamOptions()
        self._scores = PromptScores(writer.generation.num_choices)
        self._has_scores = writer.request.num_prompt_logprobs is not None

    def opening(self) -> bytes:
        return b"".join(map(self._encode, self._writer.opening()))

    async def of(self, batch: Iterable[TokenDelta]) -> bytes:
        pieces = [self._reply.take(delta) for delta in batch]
        if self._has_scores:
            pieces = [each for piece in pieces for each in self._scores.share(piece)]
        if any(piece.prompt_logprobs for piece in pieces):  # may be many megabytes
            return await run_in_threadpool(self._of_pieces, pieces)
        return self._of_pieces(pieces)

    def _of_pieces(self, pieces: Iterable[Piece]) -> bytes:
        told = (piece for piece in pieces if not self._writer.is_silent(piece))
        return b"".join(self._encode(self._writer.chunk(piece)) for piece in told)

    def usage(self) -> bytes:
        """Empty where it was not asked for."""
        if not self._options.include_usage:
            return b""
        chunk = self._writer.usage_chunk()
        chunk.usage, chunk.cos = self._reply.usage(), self._reply.report()
        return event(chunk)

    def _encode(self, chunk: ReplyBody) -> bytes:
        if self._options.include_usage:
            # null in every chunk but the last, unless asked for: as OpenAI's document has it.
            chunk.usage = self._reply.usage() if self._options.continuous_usage_stats else None
        return event(chunk)

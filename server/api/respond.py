"""Answers an accepted request, whole or as a stream, in whatever shape its endpoint writes."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence as Row
from contextlib import aclosing
from dataclasses import replace
from typing import Any, ClassVar

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from server.api.chat_protocol import ChatCompletion
from server.api.clients import client_of
from server.api.completion_protocol import Completion
from server.api.disconnect import ClientDisconnected, while_connected
from server.api.errors import describe
from server.api.generation import Generation
from server.api.middleware import CLIENT_GONE
from server.api.protocol import GenerationRequest, ReplyBody, StreamOptions, TokenProvenance
from server.api.reply import DeltaStream, Piece, PromptScores, Reply, decode, merge
from server.api.service import Service
from server.api.sse import DONE, PING, EventStream, event
from server.config import LOOKUP_NAME, HttpConfig
from server.core.output import TokenDelta
from server.core.provenance import Provenance
from server.errors import EngineError

_NO_CHOICES = '"choices":[]'

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
    def whole(self, choices: Row[Piece]) -> Completion | ChatCompletion:
        """The body of a reply that is no stream, but for usage and report."""

    @abstractmethod
    def chunk(self, piece: Piece) -> ReplyBody | None:
        """One event of a stream; None where the piece has nothing to tell yet."""

    @abstractmethod
    def usage_chunk(self) -> ReplyBody:
        """The event without choices that carries usage and report."""

    def opening(self) -> Iterable[ReplyBody]:
        """Events before the first piece."""
        return ()

    def _tells_more(self, piece: Piece) -> bool:
        """Whether a piece has something to tell even if its text is held back."""
        shows_ids = self.request.return_token_ids and piece.token_ids
        return bool(piece.finish_reason or piece.logprobs or piece.provenance or shows_ids)

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
        return await _stream(request, deltas, reply, writer, service.config.http)
    except ClientDisconnected:
        return Response(status_code=CLIENT_GONE)


async def _stream(
    request: Request, deltas: DeltaStream, reply: Reply, writer: Writer, http: HttpConfig
) -> Response:
    """Waits a while for the first tokens before it answers 200: early errors are real statuses.

    No longer than a ping may take, because proxies cut connections on which nothing comes.
    """
    awaited = _Awaited(deltas)
    try:
        has_begun = await while_connected(request, awaited.begins_within(http.ping_seconds))
    except BaseException:
        await awaited.close()
        raise
    events = _events(awaited.batches(), reply, writer, b"" if has_begun else PING)
    return EventStream(events, awaited.close, http.ping_seconds, http.send_seconds)


class _Awaited:
    """Deltas of a stream; the first are awaited at once, and not lost where that is given up."""

    def __init__(self, deltas: DeltaStream) -> None:
        self._deltas = deltas
        self._first = asyncio.create_task(_first(deltas))

    async def begins_within(self, seconds: float) -> bool:
        """Whether the first deltas came in time. Raises what ended the stream before them."""
        done, _ = await asyncio.wait({self._first}, timeout=seconds)
        if done:
            self._first.result()
        return bool(done)

    async def batches(self) -> DeltaStream:
        yield await self._first
        async for batch in self._deltas:
            yield batch

    async def close(self) -> None:
        self._first.cancel()
        await asyncio.wait({self._first})
        if not self._first.cancelled():
            self._first.exception()  # nobody is left to be told of it
        await self._deltas.aclose()


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
    return _json(body)


def _json(body: Completion | ChatCompletion) -> str:
    """Fields that were not asked for stay out.

    Each choice by itself: within one call no other thread runs, and all may be many megabytes.
    """
    choices = ",".join(choice.model_dump_json(exclude_unset=True) for choice in body.choices)
    rest = body.model_copy(update={"choices": []}).model_dump_json(exclude_unset=True)
    before, after = rest.split(_NO_CHOICES, 1)  # in a text the quotes would be escaped
    return f'{before}"choices":[{choices}]{after}'


async def _first(deltas: DeltaStream) -> list[TokenDelta]:
    return await anext(deltas)


async def _events(
    deltas: DeltaStream, reply: Reply, writer: Writer, opening: bytes
) -> AsyncGenerator[bytes]:
    events = _Events(reply, writer)
    try:
        if opening:
            yield opening
        opening = events.opening()
        async for batch in deltas:
            if encoded := opening + await events.of(batch):
                yield encoded
            opening = b""
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
        self._scores: PromptScores | None = None
        if writer.request.num_prompt_logprobs is not None:
            generation = writer.generation
            self._scores = PromptScores(len(generation.prompts), generation.num_choices)

    def opening(self) -> bytes:
        return b"".join(map(self._encode, self._writer.opening()))

    async def of(self, batch: Iterable[TokenDelta]) -> bytes:
        if self._scores is None or self._scores.are_told:
            return self._encoded(batch)
        return await run_in_threadpool(self._encoded, batch)  # may be many megabytes

    def _encoded(self, batch: Iterable[TokenDelta]) -> bytes:
        encoded = []
        for delta in batch:
            piece = self._reply.take(delta)
            for each in [piece] if self._scores is None else self._scores.share(piece):
                if (chunk := self._writer.chunk(each)) is not None:
                    encoded.append(self._encode(chunk))
        return b"".join(encoded)

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

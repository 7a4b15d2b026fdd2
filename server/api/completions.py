"""POST /v1/completions."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from server.api.disconnect import ClientDisconnected, while_connected
from server.api.errors import ERROR_RESPONSES, describe
from server.api.generation import Generation, make_generation
from server.api.protocol import Completion, CompletionChoice, CompletionRequest, StreamOptions
from server.api.reply import DeltaStream, Reply, decode, merge
from server.api.route import StrictJsonRoute
from server.api.service import service_of
from server.api.sse import DONE, EventStream, event
from server.core.output import TokenDelta
from server.errors import EngineError

logger = logging.getLogger(__name__)

ENDPOINT = "completions"
_CLIENT_GONE = 499  # nobody reads it; it tells such requests apart in the metrics

router = APIRouter(route_class=StrictJsonRoute, tags=["completions"])


@router.post("/v1/completions", response_model=Completion, responses=ERROR_RESPONSES)
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Complete one prompt or several, streamed or at once."""
    service = service_of(request)
    generation = await make_generation(body, service, f"cmpl-{secrets.token_hex(12)}")
    reply = Reply(generation, service.codec)
    deltas = decode(generation, reply, service, ENDPOINT)
    writer = _Writer(generation, reply, service.config.served_model_name)
    try:
        if not body.stream:
            return await while_connected(request, _whole(deltas, writer))
        # Waiting for the first tokens before answering 200: early errors are real statuses.
        first = await while_connected(request, _first(deltas))
    except ClientDisconnected:
        return Response(status_code=_CLIENT_GONE)
    events = _events(first, deltas, writer, body.stream_options or StreamOptions())
    return EventStream(events, deltas.aclose, service.config.http.ping_seconds)


class _Writer:
    """Bodies and chunks of one completion."""

    def __init__(self, generation: Generation, reply: Reply, model: str) -> None:
        self.reply = reply
        self.num_choices = len(generation.sequences)
        self._head = {"id": generation.id, "created": generation.created, "model": model}

    def completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            **self._head,
            object="text_completion",
            choices=choices,
            usage=self.reply.usage(),
            cos=self.reply.report(),
        )

    def chunk(self, delta: TokenDelta, options: StreamOptions) -> Completion | None:
        """None for tokens whose text is held back for now."""
        choice = self.reply.take(delta)
        if not (choice.text or choice.finish_reason or choice.logprobs):
            return None
        chunk = Completion(**self._head, object="text_completion", choices=[choice])
        if options.include_usage:
            # null in every chunk but the last, unless asked for: as OpenAI's document has it.
            chunk.usage = self.reply.usage() if options.continuous_usage_stats else None
        return chunk


async def _whole(deltas: DeltaStream, writer: _Writer) -> Response:
    parts: list[list[CompletionChoice]] = [[] for _ in range(writer.num_choices)]
    async with aclosing(deltas):
        async for batch in deltas:
            for delta in batch:
                choice = writer.reply.take(delta)
                parts[choice.index].append(choice)
    body = writer.completion([merge(index, each) for index, each in enumerate(parts)])
    return Response(body.model_dump_json(), media_type="application/json")


async def _first(deltas: DeltaStream) -> list[TokenDelta]:
    return await anext(deltas)


async def _events(
    first: list[TokenDelta], deltas: DeltaStream, writer: _Writer, options: StreamOptions
) -> AsyncGenerator[bytes]:
    try:
        if chunks := _chunks(first, writer, options):
            yield chunks
        async for batch in deltas:
            if chunks := _chunks(batch, writer, options):
                yield chunks
        if options.include_usage:
            yield event(writer.completion([]))
    except Exception as error:
        if not isinstance(error, EngineError):
            logger.exception("%s failed", writer.reply.id)
        yield event(describe(error)[1])
    yield DONE


def _chunks(batch: list[TokenDelta], writer: _Writer, options: StreamOptions) -> bytes:
    chunks = (writer.chunk(delta, options) for delta in batch)
    return b"".join(event(chunk) for chunk in chunks if chunk is not None)

"""POST /v1/completions."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from server.api.disconnect import ClientDisconnected, while_connected
from server.api.errors import ERROR_RESPONSES, describe
from server.api.generation import Generation, make_generation
from server.api.protocol import Completion, CompletionChoice, CompletionRequest, StreamOptions
from server.api.reply import Reply, decode, merge
from server.api.route import StrictJsonRoute
from server.api.service import service_of
from server.api.sse import DONE, EventStream, event
from server.errors import EngineError

ENDPOINT = "completions"
_CLIENT_GONE = 499  # nobody reads it; it tells such requests apart in the metrics

router = APIRouter(route_class=StrictJsonRoute, tags=["completions"])

Choices = AsyncGenerator[list[CompletionChoice]]


@router.post("/v1/completions", response_model=Completion, responses=ERROR_RESPONSES)
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Complete one prompt or several, streamed or at once."""
    service = service_of(request)
    generation = await make_generation(body, service, f"cmpl-{secrets.token_hex(12)}")
    _, codec = service.require()
    reply = Reply(generation, codec)
    choices = decode(generation, reply, service, ENDPOINT)
    writer = _Writer(generation, reply, service.config.served_model_name)
    try:
        if not body.stream:
            return await while_connected(request, _whole(choices, writer))
        # Waiting for the first tokens before answering 200: early errors are real statuses.
        first = await while_connected(request, _first(choices))
    except ClientDisconnected:
        return Response(status_code=_CLIENT_GONE)
    events = _events(first, choices, writer, body.stream_options or StreamOptions())
    return EventStream(events, choices.aclose, service.config.http.ping_seconds)


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

    def chunk(self, choice: CompletionChoice, options: StreamOptions) -> Completion:
        chunk = Completion(**self._head, object="text_completion", choices=[choice])
        if options.include_usage:
            # null in every chunk but the last, unless asked for: as OpenAI's document has it.
            chunk.usage = self.reply.usage() if options.continuous_usage_stats else None
        return chunk


async def _whole(choices: Choices, writer: _Writer) -> Response:
    parts: list[list[CompletionChoice]] = [[] for _ in range(writer.num_choices)]
    async with aclosing(choices):
        async for batch in choices:
            for choice in batch:
                parts[choice.index].append(choice)
    body = writer.completion([merge(index, each) for index, each in enumerate(parts)])
    return Response(body.model_dump_json(), media_type="application/json")


async def _first(choices: Choices) -> list[CompletionChoice]:
    return await anext(choices)


async def _events(
    first: list[CompletionChoice], choices: Choices, writer: _Writer, options: StreamOptions
) -> AsyncGenerator[bytes]:
    try:
        if chunks := _chunks(first, writer, options):
            yield chunks
        async for batch in choices:
            if chunks := _chunks(batch, writer, options):
                yield chunks
        if options.include_usage:
            yield event(writer.completion([]))
    except EngineError as error:
        yield event(describe(error)[1])
    yield DONE


def _chunks(batch: list[CompletionChoice], writer: _Writer, options: StreamOptions) -> bytes:
    return b"".join(
        event(writer.chunk(choice, options)) for choice in batch if _says_something(choice)
    )


def _says_something(choice: CompletionChoice) -> bool:
    """False for tokens whose text is held back for now."""
    return bool(choice.text or choice.finish_reason or choice.logprobs)

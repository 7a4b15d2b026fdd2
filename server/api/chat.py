"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Row
from functools import partial
from typing import Literal

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from server.api.call_parser import CallDelta, Reading
from server.api.chat_protocol import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    Delta,
    FunctionDelta,
    ReplyFunction,
    ReplyToolCall,
    ToolCallDelta,
)
from server.api.conversation import conversation_ids
from server.api.errors import ERROR_RESPONSES
from server.api.generation import Generation, Prompt, make_generation
from server.api.logprobs import chat_logprobs, prompt_logprobs
from server.api.reply import Piece
from server.api.respond import Writer, respond
from server.api.route import StrictJsonRoute
from server.api.service import Service, service_of
from server.api.tool_calls import ToolCalls, plan_calls

router = APIRouter(route_class=StrictJsonRoute, tags=["chat"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERROR_RESPONSES)
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """Reply to a conversation, streamed or at once."""
    service = service_of(request)
    service.check_ready()
    service.check_model(body.model)
    plan = partial(plan_calls, body, service)
    calls = await run_in_threadpool(plan) if body.tools else plan()
    if calls.shows_special:
        body = body.model_copy(update={"skip_special_tokens": False})

    async def read_prompts() -> list[Prompt]:
        return [Prompt(await conversation_ids(body, service), "messages")]

    generation = await make_generation(body, service, "chatcmpl", read_prompts, calls.structure)
    return await respond(request, ChatWriter(body, generation, service, calls), service)


class ChatWriter(Writer):
    """Bodies and chunks of one chat completion."""

    endpoint = "chat"

    def __init__(
        self,
        request: ChatCompletionRequest,
        generation: Generation,
        service: Service,
        calls: ToolCalls,
    ) -> None:
        super().__init__(request, generation, service)
        self._calls = calls
        self._parsers = [calls.make_parser() for _ in generation.sequences]

    def whole(self, choices: Row[Piece]) -> ChatCompletion:
        written = [self._choice(choice) for choice in choices]
        body = ChatCompletion(**self.head, object="chat.completion", choices=written)
        if self.request.return_token_ids:
            body.prompt_token_ids = self.generation.prompt(0).token_ids
        if (num_top := self.request.prompt_logprobs) is not None:
            as_ids = bool(self.request.return_tokens_as_token_ids)
            entries = choices[0].prompt_logprobs
            body.prompt_logprobs = prompt_logprobs(entries, num_top, self.codec, as_ids)
        return body

    def opening(self) -> Iterable[ChatCompletionChunk]:
        """Who speaks, for every choice."""
        for index in range(len(self.generation.sequences)):
            chunk = self._chunk([_chunk_choice(index, Delta(role="assistant", content=""))])
            if index == 0 and self.request.return_token_ids:
                chunk.prompt_token_ids = self.generation.prompt(0).token_ids
            yield chunk

    def chunk(self, piece: Piece) -> ChatCompletionChunk | None:
        reading = self._read(piece)
        if not reading.content and not reading.calls and not self._tells_more(piece):
            return None
        choice = _chunk_choice(piece.index, _delta(reading), self._logprobs(piece))
        choice.finish_reason = self._finish_reason(piece)
        if piece.finish_reason is not None:
            choice.stop_reason = piece.stop_reason
        if self.request.return_token_ids:
            choice.token_ids = list(piece.token_ids)
        if piece.provenance is not None:
            choice.provenance = self._provenance(piece.provenance)
        return self._chunk([choice])

    def usage_chunk(self) -> ChatCompletionChunk:
        return self._chunk([])

    def _chunk(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self.head, object="chat.completion.chunk", choices=choices)

    def _choice(self, piece: Piece) -> ChatChoice:
        message = _message(self._read(piece))
        finish_reason = self._finish_reason(piece)
        assert finish_reason is not None
        choice = ChatChoice(
            index=piece.index,
            message=message,
            logprobs=self._logprobs(piece),
            finish_reason=finish_reason,
            stop_reason=piece.stop_reason,
        )
        if self.request.return_token_ids:
            choice.token_ids = list(piece.token_ids)
        if piece.provenance is not None:
            choice.provenance = self._provenance(piece.provenance)
        return choice

    def _read(self, piece: Piece) -> Reading:
        parser = self._parsers[piece.index]
        if parser is None:
            return Reading(piece.text, ())
        return parser.feed(piece.text, is_last=piece.finish_reason is not None)

    def _finish_reason(self, piece: Piece) -> Literal["stop", "length", "tool_calls"] | None:
        """Of a piece that has been read."""
        parser = self._parsers[piece.index]
        if parser is None or piece.finish_reason is None:
            return piece.finish_reason
        return self._calls.finish_reason(piece.finish_reason, parser)

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if piece.logprobs is None:
            return None
        as_ids = bool(self.request.return_tokens_as_token_ids)
        return chat_logprobs(piece.logprobs, self.codec, as_ids)


def _chunk_choice(index: int, delta: Delta, logprobs: ChatLogprobs | None = None) -> ChunkChoice:
    return ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=None)


def _message(reading: Reading) -> ChatMessage:
    if not reading.calls:
        return ChatMessage(role="assistant", content=reading.content, refusal=None)
    return ChatMessage(
        role="assistant",
        content=reading.content or None,
        refusal=None,
        tool_calls=[_whole_call(call) for call in reading.calls],
    )


def _whole_call(call: CallDelta) -> ReplyToolCall:
    assert call.id is not None
    assert call.name is not None
    function = ReplyFunction(name=call.name, arguments=call.arguments)
    return ReplyToolCall(id=call.id, type="function", function=function)


def _delta(reading: Reading) -> Delta:
    if not reading.calls:
        return Delta(content=reading.content)
    calls = [_call_delta(call) for call in reading.calls]
    if not reading.content:
        return Delta(tool_calls=calls)
    return Delta(content=reading.content, tool_calls=calls)


def _call_delta(call: CallDelta) -> ToolCallDelta:
    if call.id is None:
        return ToolCallDelta(index=call.index, function=FunctionDelta(arguments=call.arguments))
    function = FunctionDelta(name=call.name, arguments=call.arguments)
    return ToolCallDelta(index=call.index, id=call.id, type="function", function=function)

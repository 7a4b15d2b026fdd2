"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Row

from fastapi import APIRouter, Request, Response

from server.api.chat_protocol import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    Delta,
)
from server.api.conversation import conversation_ids
from server.api.errors import ERROR_RESPONSES
from server.api.generation import Prompt, make_generation
from server.api.logprobs import chat_logprobs, prompt_logprobs
from server.api.reply import Piece
from server.api.respond import Writer, respond
from server.api.route import StrictJsonRoute
from server.api.service import service_of

router = APIRouter(route_class=StrictJsonRoute, tags=["chat"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERROR_RESPONSES)
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """Reply to a conversation, streamed or at once."""
    service = service_of(request)

    async def read_prompts() -> list[Prompt]:
        return [Prompt(await conversation_ids(body, service), "messages")]

    generation = await make_generation(body, service, "chatcmpl", read_prompts)
    return await respond(request, ChatWriter(body, generation, service), service)


class ChatWriter(Writer):
    """Bodies and chunks of one chat completion."""

    endpoint = "chat"

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

    def chunk(self, piece: Piece) -> ChatCompletionChunk:
        choice = _chunk_choice(piece.index, Delta(content=piece.text), self._logprobs(piece))
        choice.finish_reason = piece.finish_reason
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
        assert piece.finish_reason is not None
        choice = ChatChoice(
            index=piece.index,
            message=ChatMessage(role="assistant", content=piece.text, refusal=None),
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
        )
        if self.request.return_token_ids:
            choice.token_ids = list(piece.token_ids)
        if piece.provenance is not None:
            choice.provenance = self._provenance(piece.provenance)
        return choice

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if piece.logprobs is None:
            return None
        as_ids = bool(self.request.return_tokens_as_token_ids)
        return chat_logprobs(piece.logprobs, self.codec, as_ids)


def _chunk_choice(index: int, delta: Delta, logprobs: ChatLogprobs | None = None) -> ChunkChoice:
    return ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=None)

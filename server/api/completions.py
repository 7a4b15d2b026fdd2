"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence as Row

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from server.api.completion_protocol import Completion, CompletionChoice, CompletionRequest
from server.api.errors import ERROR_RESPONSES
from server.api.generation import Generation, Prompt, make_generation
from server.api.limits import check_chars
from server.api.logprobs import LogprobsWriter
from server.api.reply import Piece
from server.api.respond import Writer, respond
from server.api.route import StrictJsonRoute
from server.api.service import Service, service_of
from server.errors import UnsupportedParameter

router = APIRouter(route_class=StrictJsonRoute, tags=["completions"])


@router.post("/v1/completions", response_model=Completion, responses=ERROR_RESPONSES)
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Complete one prompt or several, streamed or at once."""
    service = service_of(request)

    async def read_prompts() -> list[Prompt]:
        return await _read_prompts(body, service)

    generation = await make_generation(body, service, "cmpl", read_prompts)
    return await respond(request, CompletionWriter(body, generation, service), service)


class CompletionWriter(Writer):
    """Bodies and chunks of one completion."""

    endpoint = "completions"

    def __init__(
        self, request: CompletionRequest, generation: Generation, service: Service
    ) -> None:
        super().__init__(request, generation, service)
        as_ids = bool(request.return_tokens_as_token_ids)
        self._logprobs = [LogprobsWriter(self.codec, as_ids) for _ in generation.sequences]
        self._has_begun: set[int] = set()

    def whole(self, choices: Row[Piece]) -> Completion:
        return self._body([self._choice(choice) for choice in choices])

    def chunk(self, piece: Piece) -> Completion:
        return self._body([self._choice(piece)])

    def usage_chunk(self) -> Completion:
        return self._body([])

    def _body(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(**self.head, object="text_completion", choices=choices)

    def _choice(self, piece: Piece) -> CompletionChoice:
        logprobs = piece.logprobs
        choice = CompletionChoice(
            index=piece.index,
            text=piece.text,
            logprobs=None if logprobs is None else self._logprobs[piece.index].write(logprobs),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
        )
        if self.request.return_token_ids:
            choice.token_ids = list(piece.token_ids)
            if piece.index not in self._has_begun:
                choice.prompt_token_ids = self.generation.prompt_token_ids(piece.index)
        self._has_begun.add(piece.index)
        return choice


async def _read_prompts(request: CompletionRequest, service: Service) -> list[Prompt]:
    """Token ids of each prompt. Texts are tokenised off the event loop."""
    if request.best_of not in (None, request.n or 1):
        raise UnsupportedParameter("best_of", "must be null or equal to n")
    ids = await _token_ids(request, service)
    fields = ["prompt"] if len(ids) == 1 else [f"prompt.{index}" for index in range(len(ids))]
    return [Prompt(*pair) for pair in zip(ids, fields, strict=True)]


async def _token_ids(request: CompletionRequest, service: Service) -> list[list[int]]:
    prompt, codec = request.prompt, service.codec
    prompts = [prompt] if isinstance(prompt, str) or _is_token_list(prompt) else list(prompt)
    texts = [each for each in prompts if isinstance(each, str)]
    check_chars(sum(map(len, texts)), service.config.http, "prompt")
    adds_special = request.add_special_tokens is not False

    def encode() -> list[list[int]]:
        return [codec.encode(text, adds_special) if text else [] for text in texts]

    if texts:
        return await run_in_threadpool(encode)
    given = [each for each in prompts if isinstance(each, list)]
    ids = [[token_id for token_id in each if isinstance(token_id, int)] for each in given]
    for each in ids:
        codec.check_ids(each, "prompt")
    return ids


def _is_token_list(prompt: object) -> bool:
    return isinstance(prompt, list) and (not prompt or isinstance(prompt[0], int))

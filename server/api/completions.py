"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence as Row

from fastapi import APIRouter, Request, Response

from server.api.completion_protocol import Completion, CompletionChoice, CompletionRequest, Logprobs
from server.api.errors import ERROR_RESPONSES
from server.api.generation import Generation, Prompt, make_generation
from server.api.limits import check_chars
from server.api.logprobs import LogprobsWriter, prompt_logprobs, trimmed
from server.api.protocol import PromptLogprobs
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
    echoed = await _echoed(body, generation, service)
    return await respond(request, CompletionWriter(body, generation, service, echoed), service)


class CompletionWriter(Writer):
    """Bodies and chunks of one completion."""

    endpoint = "completions"

    def __init__(
        self,
        request: CompletionRequest,
        generation: Generation,
        service: Service,
        echoed: Row[str],
    ) -> None:
        """`echoed`: what each prompt's choices begin with, if anything."""
        super().__init__(request, generation, service)
        self.request: CompletionRequest = request
        as_ids = bool(request.return_tokens_as_token_ids)
        self._logprobs = [LogprobsWriter(self.codec, as_ids) for _ in generation.sequences]
        self._echoed = echoed
        self._begun: set[int] = set()
        self._scored_prompts: dict[int, PromptLogprobs] = {}

    def whole(self, choices: Row[Piece]) -> Completion:
        return self._body([self._choice(choice) for choice in choices])

    def chunk(self, piece: Piece) -> Completion | None:
        if not piece.text and not self._tells_more(piece):
            return None
        return self._body([self._choice(piece)])

    def usage_chunk(self) -> Completion:
        return self._body([])

    def _body(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(**self.head, object="text_completion", choices=choices)

    def _choice(self, piece: Piece) -> CompletionChoice:
        is_first = piece.index not in self._begun
        self._begun.add(piece.index)
        echoes = is_first and bool(self.request.echo)
        echoed = self._echoed[piece.index // self.generation.num_choices] if echoes else ""
        choice = CompletionChoice(
            index=piece.index,
            text=echoed + piece.text,
            logprobs=self._choice_logprobs(piece, echoes),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
        )
        if self.request.return_token_ids:
            choice.token_ids = list(piece.token_ids)
            if is_first:
                choice.prompt_token_ids = self.generation.prompt(piece.index).token_ids
        if piece.provenance is not None:
            choice.provenance = self._provenance(piece.provenance)
        if self.request.prompt_logprobs is not None:
            choice.prompt_logprobs = self._scored_prompt(piece, self.request.prompt_logprobs)
        return choice

    def _scored_prompt(self, piece: Piece, num_top: int) -> PromptLogprobs:
        """The same of all choices of a prompt."""
        prompt = piece.index // self.generation.num_choices
        if prompt not in self._scored_prompts:
            as_ids = bool(self.request.return_tokens_as_token_ids)
            scored = prompt_logprobs(piece.prompt_logprobs, num_top, self.codec, as_ids)
            self._scored_prompts[prompt] = scored
        return self._scored_prompts[prompt]

    def _choice_logprobs(self, piece: Piece, echoes: bool) -> Logprobs | None:
        if piece.logprobs is None:
            return None
        writer = self._logprobs[piece.index]
        if not echoes:
            return writer.write(piece.logprobs)
        echoed = trimmed(piece.prompt_logprobs, self.request.num_logprobs or 0)
        first = self.generation.prompt(piece.index).token_ids[0]
        return writer.write([*echoed, *piece.logprobs], first)


async def _echoed(
    request: CompletionRequest, generation: Generation, service: Service
) -> list[str]:
    """The text of each prompt, as the client wrote it or of what is left of it, where asked for."""
    prompts, skips_special = generation.prompts, request.skip_special_tokens is not False
    if not request.echo:
        return []

    def texts() -> list[str]:
        return [
            service.codec.decode(prompt.token_ids, skips_special)
            if prompt.text is None
            else prompt.text
            for prompt in prompts
        ]

    num_tokens = sum(len(prompt.token_ids) for prompt in prompts if prompt.text is None)
    return await service.convert(texts, num_tokens) if num_tokens else texts()


async def _read_prompts(request: CompletionRequest, service: Service) -> list[Prompt]:
    """Token ids of each prompt. Texts are tokenised off the event loop."""
    if request.best_of not in (None, request.n or 1):
        raise UnsupportedParameter("best_of", "must be null or equal to n")
    ids = await _token_ids(request, service)
    fields = ["prompt"] if len(ids) == 1 else [f"prompt.{index}" for index in range(len(ids))]
    prompts = _prompts(request)
    return [
        Prompt(token_ids, field, prompt if isinstance(prompt, str) else None)
        for token_ids, field, prompt in zip(ids, fields, prompts, strict=True)
    ]


async def _token_ids(request: CompletionRequest, service: Service) -> list[list[int]]:
    prompts, codec = _prompts(request), service.codec
    texts = [each for each in prompts if isinstance(each, str)]
    check_chars(sum(map(len, texts)), service.config.http, "prompt")
    adds_special = request.add_special_tokens is not False

    def encode() -> list[list[int]]:
        return [codec.encode(text, adds_special) if text else [] for text in texts]

    if texts:
        return await service.convert(encode, sum(map(len, texts)))
    given = [each for each in prompts if isinstance(each, list)]
    ids = [[token_id for token_id in each if isinstance(token_id, int)] for each in given]
    for each in ids:
        codec.check_ids(each, "prompt")
    return ids


def _prompts(request: CompletionRequest) -> list[object]:
    """One or several, as they were given."""
    prompt = request.prompt
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)

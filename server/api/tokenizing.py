"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from starlette.concurrency import run_in_threadpool

from server.api.chat_protocol import Conversation
from server.api.codec import Codec
from server.api.conversation import conversation_ids
from server.api.errors import ERROR_RESPONSES
from server.api.limits import check_chars, check_tokens
from server.api.protocol import Body, Items
from server.api.route import StrictJsonRoute
from server.api.service import Service, service_of
from server.api.unsupported import check_supported

router = APIRouter(route_class=StrictJsonRoute, tags=["tokenizer"])


class _TokenizeOptions(Body):
    """What both ways of tokenising have in common."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    model: str | None = Field(None, description="The served model's name, or null.")
    return_token_strs: bool | None = Field(
        None, description="Also give each token as the vocabulary writes it."
    )


class TokenizePrompt(_TokenizeOptions):
    """A text."""

    prompt: str = Field(description="Text to tokenise.")
    add_special_tokens: bool | None = Field(
        None, description="Add the tokenizer's own; true if null."
    )


class TokenizeMessages(_TokenizeOptions, Conversation):
    """A conversation, rendered as /v1/chat/completions renders it."""


class Tokens(BaseModel):
    """Token ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    model: str | None = Field(None, description="The served model's name, or null.")
    tokens: Items[int] = Field(description="Token ids.")


class Detokenized(BaseModel):
    """The text of token ids, special tokens included."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What clients need to write prompts themselves; null for what the tokenizer lacks."""

    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


def _kind(body: object) -> str | None:
    if isinstance(body, _TokenizeOptions):  # validated before, in a thread
        return "of_messages" if isinstance(body, TokenizeMessages) else "of_prompt"
    if not isinstance(body, dict):
        return None
    return "of_messages" if body.get("messages") is not None else "of_prompt"


TokenizeRequest = Annotated[
    Annotated[TokenizePrompt, Tag("of_prompt")] | Annotated[TokenizeMessages, Tag("of_messages")],
    Discriminator(_kind),
]


@router.post("/tokenize", responses=ERROR_RESPONSES)
async def tokenize(request: Request, body: TokenizeRequest) -> Tokens:
    """Token ids of a text or of a conversation."""
    service = _ready_service(request, body.model)
    codec = service.codec
    check_supported(body)
    if isinstance(body, TokenizeMessages):
        ids = await conversation_ids(body, service)
    else:
        check_chars(len(body.prompt), service.config.http, "prompt")
        adds_special = body.add_special_tokens is not False
        encode = partial(codec.encode, body.prompt, adds_special)
        ids = await service.convert(encode, len(body.prompt))
    names = await run_in_threadpool(_names, ids, codec) if body.return_token_strs else None
    return Tokens(
        count=len(ids), max_model_len=service.engine.max_length, tokens=ids, token_strs=names
    )


@router.post("/detokenize", responses=ERROR_RESPONSES)
async def detokenize(request: Request, body: DetokenizeRequest) -> Detokenized:
    """The text of token ids."""
    service = _ready_service(request, body.model)
    codec, ids = service.codec, body.tokens
    check_tokens(len(ids), service.config.http, "tokens")
    codec.check_ids(ids, "tokens")
    return Detokenized(prompt=await service.convert(partial(codec.decode, ids), len(ids)))


@router.get("/tokenizer_info", responses=ERROR_RESPONSES)
async def tokenizer_info(request: Request) -> TokenizerInfo:
    """Special tokens and chat template of the expert."""
    codec = _ready_service(request, None).codec
    template = codec.chat_template
    special = codec.special_tokens
    return TokenizerInfo(
        vocab_size=codec.vocab_size,
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        pad_token=special.get("pad_token"),
        unk_token=special.get("unk_token"),
        chat_template=None if template is None else template.source,
    )


def _ready_service(request: Request, model: str | None) -> Service:
    service = service_of(request)
    service.check_ready()
    if model is not None:
        service.check_model(model)
    return service


def _names(ids: list[int], codec: Codec) -> list[str]:
    return [codec.vocabulary_entry(token_id) for token_id in ids]

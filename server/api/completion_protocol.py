"""Bodies of /v1/completions as the client sends and gets them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from server.api.protocol import (
    FewItems,
    GenerationRequest,
    Items,
    PromptLogprobs,
    ReplyBody,
    TokenProvenance,
    any_of,
)

DEFAULT_MAX_TOKENS = 16

Prompt = Annotated[
    str | Items[str] | Items[int] | Items[Items[int]],
    any_of(
        "a string, a list of strings, a list of token ids or a list of such lists; "
        "token ids are integers"
    ),
    FewItems,
]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompt = Field(description="Text or token ids, one prompt or several.")
    max_tokens: int | None = Field(
        None, ge=0, description="16 if null; cut to what the context leaves; 0 only with echo."
    )
    best_of: int | None = Field(None, description="Only null or equal to n.")
    logprobs: int | None = Field(
        None, ge=0, description="Alternatives to report for each token, its own one besides."
    )
    echo: bool | None = Field(None, description="The text begins with the prompt's.")
    add_special_tokens: bool | None = Field(
        None, description="Add the tokenizer's own to a text prompt; true if null."
    )

    @property
    def max_new_tokens(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def length_field(self) -> str:
        return "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """With echo, logprobs are the prompt's too; and they are what max_tokens=0 waits for."""
        echoed = self.logprobs if self.echo else None
        none_generated = 0 if self.max_tokens == 0 else None
        wanted = [k for k in (self.prompt_logprobs, echoed, none_generated) if k is not None]
        return max(wanted, default=None)

    @property
    def num_prompt_scores(self) -> int:
        """Each choice tells them anew, by either name; and what tells none may compute one."""
        wanted = (self.prompt_logprobs, self.logprobs if self.echo else None)
        told = sum(num_top + 1 for num_top in wanted if num_top is not None)
        return (self.n or 1) * (told or int(self.num_prompt_logprobs is not None))

    @property
    def may_generate_nothing(self) -> bool:
        return bool(self.echo)

    @property
    def logprobs_field(self) -> str:
        return "logprobs"

    @property
    def num_prompts(self) -> int:
        is_one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return 1 if is_one else len(self.prompt)


class Logprobs(BaseModel):
    """Of the combined distribution before temperature and truncation."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for an echoed first token.")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text, or one piece of it in a stream."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    prompt_token_ids: list[int] | None = Field(
        None, description="With return_token_ids; in a stream on a choice's first chunk."
    )
    token_ids: list[int] | None = Field(None, description="With return_token_ids.")
    provenance: list[TokenProvenance] | None = Field(
        None, description="With cos.provenance; one for each token."
    )
    prompt_logprobs: PromptLogprobs | None = Field(None, description="Where asked for by name.")


class Completion(ReplyBody):
    """The body of a completion, or one chunk of a stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]

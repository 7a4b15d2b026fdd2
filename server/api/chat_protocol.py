"""Bodies of /v1/chat/completions as the client sends and gets them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    Tag,
)

from server.api.protocol import (
    MOST_ITEMS,
    Body,
    Entries,
    FewItems,
    Finite,
    GenerationRequest,
    Items,
    PromptLogprobs,
    ReplyBody,
    TokenProvenance,
    any_of,
    at_most,
)

MAX_MESSAGES = 4096
MAX_TOOLS = 128

Scalar = Annotated[
    StrictBool | StrictInt | Finite | str | None, any_of("a string, a number, a boolean or null")
]


class TextPart(Body):
    """One text among the parts of a message."""

    type: Literal["text"] = Field(description="Parts of any other type are refused.")
    text: str


def _content_kind(content: object) -> str | None:
    if isinstance(content, str):
        return "string"
    return "parts" if isinstance(content, list) else None


Content = Annotated[
    Annotated[str, Tag("string")] | Annotated[Items[TextPart], FewItems, Tag("parts")],
    Discriminator(
        _content_kind,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


class FunctionCall(Body):
    """A call, as a reply's text had it."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str | None = Field(None, description="JSON.")


class ToolCall(Body):
    """One call in a message of the assistant's."""

    id: str | None = None
    type: Literal["function"] = Field("function", description="No other kind is known.")
    function: FunctionCall


class Function(Body):
    """What the model is told of a function; the template shows it as it is."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; not checked.")


class Tool(Body):
    """One tool that the model may call."""

    type: Literal["function"] = Field(description="No other kind is known.")
    function: Function


class FunctionName(Body):
    """One of the tools' functions."""

    name: str = Field(min_length=1, max_length=256)


class NamedTool(Body):
    """The one function that the reply has to call."""

    type: Literal["function"] = Field(description="No other kind is known.")
    function: FunctionName


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    any_of('none, auto, required or {"type": "function", "function": {"name": ...}}'),
]


class Message(Body):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    role: str = Field(min_length=1, description="Any that the chat template takes.")
    content: Content | None = Field(
        None, description="Text; parts are joined by line breaks. null only beside tool_calls."
    )
    name: str | None = Field(None, description="Of the speaker, for templates that read it.")
    tool_calls: Items[ToolCall] | None = Field(
        None, max_length=128, description="For templates that read them."
    )
    tool_call_id: str | None = Field(None, description="Of the call that this message answers.")

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


def _check_counts(messages: object) -> object:
    """Messages, and the parts and calls of all of them together, before any is looked at.

    Each list within a message has a limit of its own; thousands of long ones would add up.
    """
    if not isinstance(messages, list):
        return messages
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"Input should have at most {MAX_MESSAGES} messages")
    if sum(map(_num_items, messages)) > MOST_ITEMS:
        raise ValueError(f"Input should have at most {MOST_ITEMS} parts and calls in all messages")
    return messages


def _num_items(message: object) -> int:
    if not isinstance(message, dict):
        return 0
    lists = (message.get("content"), message.get("tool_calls"))
    return sum(len(each) for each in lists if isinstance(each, list))


class Conversation(Body):
    """Messages, and how the expert's chat template turns them into a prompt."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    messages: Annotated[Items[Message], BeforeValidator(_check_counts)] = Field(
        min_length=1, description="The conversation so far."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Open the reply's turn; true if null, unless the last one is continued."
    )
    continue_final_message: bool | None = Field(
        None, description="Leave the last message's turn open; not with add_generation_prompt."
    )
    chat_template_kwargs: Entries[Scalar] | None = Field(
        None, description="Variables that the chat template reads; plain values only."
    )
    tools: Annotated[Items[Tool] | None, at_most(MAX_TOOLS)] = Field(
        None, description="That the reply may call; for templates that read them."
    )
    tool_choice: ToolChoice | None = Field(
        None,
        description="auto, the default, leaves calls to the model; none leaves the tools out; "
        "required, or a function's name, makes the reply calls and nothing else.",
    )
    add_special_tokens: bool | None = Field(
        None, description="Add the tokenizer's own to the rendered text; false if null."
    )


class ChatCompletionRequest(GenerationRequest, Conversation):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(
        None, ge=0, description="All that the context leaves if null; cut to that otherwise."
    )
    max_tokens: int | None = Field(
        None, ge=0, description="The older name; max_completion_tokens wins."
    )
    logprobs: bool | None = Field(None, description="Report log-probabilities.")
    top_logprobs: int | None = Field(
        None, ge=0, description="Alternatives for each token; needs logprobs."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Several calls in one reply; true if null."
    )

    @property
    def max_new_tokens(self) -> int | None:
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def length_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def logprobs_field(self) -> str:
        return "top_logprobs"

    @property
    def has_stray_logprobs(self) -> bool:
        return bool(self.top_logprobs) and not self.logprobs


class TokenTop(BaseModel):
    """One token and its log-probability under the combined distribution."""

    token: str
    logprob: float
    bytes: list[int]


class TokenScore(TokenTop):
    """A generated token, and the most probable ones at its place."""

    top_logprobs: list[TokenTop]


class ChatLogprobs(BaseModel):
    """Of the combined distribution before temperature and truncation."""

    content: list[TokenScore]
    refusal: None


class ReplyFunction(BaseModel):
    """What a reply calls."""

    name: str
    arguments: str = Field(description="JSON as the model wrote it: it may be invalid.")


class ReplyToolCall(BaseModel):
    """One call of a reply."""

    id: str
    type: Literal["function"]
    function: ReplyFunction


class ChatMessage(BaseModel):
    """The reply."""

    role: Literal["assistant"]
    content: str | None = Field(description="null where the reply is calls and nothing else.")
    refusal: None
    tool_calls: list[ReplyToolCall] | None = Field(None, description="Where there are any.")


class ChatChoice(BaseModel):
    """One reply."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    token_ids: list[int] | None = Field(None, description="With return_token_ids.")
    provenance: list[TokenProvenance] | None = Field(
        None, description="With cos.provenance; one for each token."
    )


class ChatCompletion(ReplyBody):
    """The body of a chat completion."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    prompt_token_ids: list[int] | None = Field(None, description="With return_token_ids.")
    prompt_logprobs: PromptLogprobs | None = Field(None, description="Where asked for.")


class FunctionDelta(BaseModel):
    """A piece of what a reply calls."""

    name: str | None = Field(None, description="With a call's first piece.")
    arguments: str = Field(description="What follows in the arguments' JSON.")


class ToolCallDelta(BaseModel):
    """A piece of one call."""

    index: int = Field(description="Of the call in its reply.")
    id: str | None = Field(None, description="With a call's first piece, as type.")
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """A piece of a reply; the first one of a choice has its role."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(BaseModel):
    """A piece of one choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = Field(None, description="With return_token_ids.")
    provenance: list[TokenProvenance] | None = Field(
        None, description="With cos.provenance; one for each token."
    )


class ChatCompletionChunk(ReplyBody):
    """One event of a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    prompt_token_ids: list[int] | None = Field(
        None, description="With return_token_ids, on the first chunk."
    )

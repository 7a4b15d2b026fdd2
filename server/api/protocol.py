"""What the bodies of all generating endpoints share, as the client sends and gets them.

Checked here: types and ranges that hold for any server. Limits of this server are limits.py's.
Unknown fields are allowed at the top level, as OpenAI's own clients send them; those that would
change the text are refused by name (unsupported.py).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
)

from server.config import CombinationConfig, StrategyName
from server.core.provenance import TokenOutcome

T = TypeVar("T")

# Both keep a large and wrong body from costing everyone seconds: pydantic would describe each
# wrong item of it, on the event loop. The first one is enough, and so many entries are.
Items = Annotated[list[T], Field(fail_fast=True)]
_MOST_ENTRIES = 1 << 14
MOST_ITEMS = 1 << 14  # prompts, messages, or parts of one: items that are objects or long texts
# Of an object whose unknown keys are errors: far more than any such object knows.
_MOST_KEYS = 64

Finite = Annotated[float, Field(allow_inf_nan=False)]
_LOWEST_TEMPERATURE = 1e-5
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


def any_of(expected: str) -> WrapValidator:
    """One problem for a union instead of one for each of its members."""

    def validate(value: object, handler: Callable[[object], object]) -> object:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"Input should be {expected}") from None

    return WrapValidator(validate)


def at_most(limit: int) -> BeforeValidator:
    """Objects of more entries are refused before any of them is looked at.

    Lists too, but for lists of numbers, which take little time.
    """

    def check(value: object) -> object:
        is_long = isinstance(value, dict | list) and len(value) > limit
        if is_long and not (isinstance(value, list) and isinstance(value[0], int)):
            raise ValueError(f"Input should have at most {limit} entries")
        return value

    return BeforeValidator(check)


FewItems = at_most(MOST_ITEMS)
Entries = Annotated[dict[str, T], at_most(_MOST_ENTRIES)]
RequestId = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")]
CacheSalt = Annotated[str, Field(pattern=r"^[^@/\\\x00]{1,128}$")]
Stop = Annotated[str | Items[str] | None, any_of("a string or a list of strings")]
Gamma = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=1)] | Items[Annotated[int, Field(ge=1)]] | None,
    any_of('a positive integer, a list of one for each model, or "auto"'),
]


class Body(BaseModel):
    """Strict: `true` is no number and `"1"` is no integer."""

    model_config = ConfigDict(strict=True, frozen=True)


def _strict_numbers(value: object) -> object:
    """A combination's numbers are no text and no `true`, which a YAML file's may be (1e-3 is)."""
    if isinstance(value, dict):
        for name in value.keys() & {"mu", "plausibility", "weights"}:
            numbers = value[name] if isinstance(value[name], list) else [value[name]]
            if any(map(_reads_as_number, numbers)):
                raise ValueError(f"{name}: Input should be a valid number")
    return value


def _reads_as_number(value: object) -> bool:
    """It is none, and would be taken for one; of what would not the field itself is told."""
    if isinstance(value, str):
        with suppress(ValueError):
            return math.isfinite(float(value))
    return isinstance(value, bool)


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(False, description="A last chunk with usage and no choices.")
    continuous_usage_stats: bool | None = Field(
        False, description="Usage so far in every chunk; needs include_usage."
    )


class CosOptions(Body):
    """How this request is decoded, where it departs from the server's configuration."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    combination: Annotated[
        CombinationConfig | None, BeforeValidator(_strict_numbers), at_most(_MOST_KEYS)
    ] = Field(None, description="How the members' scores become one distribution.")
    strategy: StrategyName | None = Field(None, description="Which model advances next.")
    gamma: Gamma = Field(
        None, description='Proposal length of the first, or of each model, or "auto".'
    )
    kappa: int | None = Field(
        None, ge=0, description="mixture: foreign-coin tokens the first model may draft through."
    )
    shared_coins: bool | None = Field(
        None,
        description="mixture, auto: take the batch's coins; allowed by default for one choice "
        "without a seed.",
    )
    prompt_lookup: bool | None = Field(
        None,
        description="Propose what followed the last tokens before, where the server has that; true "
        "if null, but for a strategy standard or single of the request's own.",
    )
    provenance: bool | None = Field(
        None, description="Report where each token of a choice came from; false if null."
    )


JsonSchema = Annotated[dict[str, Any] | bool, any_of("a JSON schema")]


class JsonSchemaFormat(Body):
    """A JSON schema with a name, as OpenAI's clients send it."""

    name: str | None = Field(None, description="Ignored.")
    description: str | None = Field(None, description="Ignored.")
    schema_: JsonSchema = Field(alias="schema", description="The reply follows it.")
    strict: bool | None = Field(None, description="Ignored: the reply always follows it.")


class ResponseFormat(Body):
    """The form of the whole text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(None, description="Of type json_schema.")
    schema_: JsonSchema | None = Field(
        None, alias="schema", description="The same without a name; of type json_object, too."
    )


Schema = Annotated[dict[str, Any] | bool | str, any_of("a JSON schema, or one as a string")]


class StructuredOutputs(Body):
    """The form of the whole text; one of these."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    # `json` would hide a method of its base.
    json_: Schema | None = Field(None, alias="json", description="A JSON schema.")
    json_object: bool | None = Field(None, description="Any JSON object.")
    regex: str | None = Field(None, description="A regular expression for the whole text.")
    choice: Items[str] | None = Field(None, min_length=1, description="One of these texts.")
    grammar: str | None = Field(None, description="A grammar in llguidance's dialect of Lark.")


def _seed(seed: int | None) -> int | None:
    """As clients of vLLM and llama.cpp say that they want none."""
    return None if seed == -1 else seed


class GenerationRequest(Body):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    model: str = Field(description="The served model's name.")
    min_tokens: int | None = Field(None, ge=0, description="No end of text before so many tokens.")
    n: int | None = Field(None, ge=1, description="Choices for each prompt; 1 if null.")
    stream: bool | None = Field(None, description="Server-sent events instead of one body.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    temperature: Finite | None = Field(
        None, ge=0, le=2, description="1 if null; 0, and what is below 1e-5, is greedy."
    )
    top_p: Finite | None = Field(None, gt=0, le=1, description="Nucleus mass.")
    top_k: int | None = Field(None, ge=-1, description="0 and -1 keep all tokens.")
    min_p: Finite | None = Field(None, ge=0, le=1, description="Fraction of the top probability.")
    presence_penalty: Finite | None = Field(None, ge=-2, le=2, description="OpenAI's.")
    frequency_penalty: Finite | None = Field(None, ge=-2, le=2, description="OpenAI's.")
    repetition_penalty: Finite | None = Field(
        None, ge=0.01, le=100, description="Over prompt and generated tokens; 1 is none."
    )
    logit_bias: Entries[Annotated[Finite, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token id to bias."
    )
    allowed_token_ids: Items[int] | None = Field(None, description="Only these are generated.")
    response_format: ResponseFormat | None = Field(None, description="The form of the text.")
    structured_outputs: Annotated[StructuredOutputs | None, at_most(_MOST_KEYS)] = Field(
        None, description="The same, more forms."
    )
    guided_json: Schema | None = Field(None, description="structured_outputs.json.")
    guided_regex: str | None = Field(None, description="structured_outputs.regex.")
    guided_choice: Items[str] | None = Field(
        None, min_length=1, description="structured_outputs.choice."
    )
    guided_grammar: str | None = Field(None, description="structured_outputs.grammar.")
    bad_words: Items[str] | None = Field(None, description="Texts that are never completed.")
    stop: Stop = Field(None, description="Strings that end the text.")
    stop_token_ids: Items[int] | None = Field(None, description="Tokens that end the text.")
    include_stop_str_in_output: bool | None = Field(None, description="Keep the stop string.")
    ignore_eos: bool | None = Field(None, description="End-of-text tokens do not end the text.")
    skip_special_tokens: bool | None = Field(None, description="Leave them out; true if null.")
    seed: Annotated[Int64 | None, AfterValidator(_seed)] = Field(
        None, description="Same request and seed, same text; -1 is none."
    )
    prompt_logprobs: int | None = Field(
        None, ge=0, description="Alternatives to report for each token of the prompt; no stream."
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="Keep so many tokens at the prompt's end; -1 keeps what fits."
    )
    return_token_ids: bool | None = Field(None, description="Also give the ids of prompt and text.")
    return_tokens_as_token_ids: bool | None = Field(
        None, description='Log-probabilities call tokens "token_id:N".'
    )
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = Field(
        None, description="Lower ones leave the queue first; 0 if null. Not for all servers."
    )
    cache_salt: CacheSalt | None = Field(
        None, description="Prompts are found in the prefix cache under the same salt only."
    )
    request_id: RequestId | None = Field(None, description="Ends the reply's id.")
    user: Any = Field(None, description="Accepted and ignored.")
    cos: Annotated[CosOptions | None, at_most(_MOST_KEYS)] = Field(
        None, description="Collaborative decoding of this request."
    )

    @property
    def effective_temperature(self) -> float:
        """1 if null; what would overflow the logits is as good as greedy, and counts as 0."""
        temperature = 1.0 if self.temperature is None else float(self.temperature)
        return temperature if temperature >= _LOWEST_TEMPERATURE else 0.0

    @property
    @abstractmethod
    def max_new_tokens(self) -> int | None:
        """Tokens to generate at most; None for all that the context leaves."""

    @property
    @abstractmethod
    def length_field(self) -> str:
        """The field that `max_new_tokens` came from."""

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None for no log-probabilities."""

    @property
    @abstractmethod
    def logprobs_field(self) -> str:
        """The field that `num_logprobs` came from."""

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives to compute for each token of the prompt; None for nothing at all."""
        return self.prompt_logprobs

    @property
    def num_prompt_scores(self) -> int:
        """Scores in the answer for each token of a prompt."""
        return 0 if self.prompt_logprobs is None else self.prompt_logprobs + 1

    @property
    def may_generate_nothing(self) -> bool:
        """Whether the prompt alone is an answer."""
        return False

    @property
    def has_stray_logprobs(self) -> bool:
        """Alternatives were asked for, but no log-probabilities."""
        return False

    @property
    def num_prompts(self) -> int:
        return 1


class PromptTokensDetails(BaseModel):
    """Of the prompt tokens."""

    cached_tokens: int = Field(description="Found in the prefix cache; no model read them.")


class PromptLogprob(BaseModel):
    """One token at one place of the prompt."""

    logprob: float = Field(description="Of the combined distribution, before any warp.")
    rank: int = Field(description="Its place among all tokens, from 1.")
    decoded_token: str


# By token id, the prompt's own first; null for the first token, which nothing comes before.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class TokenProvenance(BaseModel):
    """Where one generated token came from."""

    model: str | None = Field(
        description="Who proposed there, a configured name or prompt_lookup; null where nobody did."
    )
    outcome: TokenOutcome = Field(
        description="The proposal was accepted; was a bonus, and accepted; was rejected, and "
        "another token recovered; there was none, and the token was drawn; or the form allowed no "
        "other, and it was forced."
    )


class Usage(BaseModel):
    """Each prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class LookupReport(BaseModel):
    """What prompt lookup proposed."""

    proposed: int = Field(description="Tokens it proposed.")
    accepted: int = Field(description="Of these, accepted.")


class CosReport(BaseModel):
    """What this request's decoding was and took; [models] lists are in configured order."""

    strategy: StrategyName = Field(description="As asked for, or configured.")
    strategies: dict[str, int] = Field(
        description="Tokens by the strategy that was used: under auto, what was chosen."
    )
    combination: dict[str, Any]
    gamma: list[int] = Field(
        description="Proposal lengths; where they are chosen, the last ones of the first choice, "
        "and 0 for a model that does not propose."
    )
    kappa: int | None = Field(description="null unless the strategy is mixture.")
    shared_coins: bool | None = Field(description="null unless the strategy is mixture.")
    proposed: list[int] = Field(description="Tokens proposed, by proposer.")
    accepted: list[int] = Field(description="Proposed tokens accepted, by proposer.")
    prompt_lookup: LookupReport | None = Field(description="null where it is off.")
    forwards: list[int] = Field(description="Forwards that decoded, by model.")
    recovered: int = Field(description="Tokens resampled after a rejection.")
    drawn: int = Field(description="Tokens drawn with nothing proposed.")
    forced: int = Field(description="Tokens that were the only ones a form allowed.")
    bonus: int = Field(description="Tokens proposed right after scoring other models' proposals.")
    discarded: int = Field(description="Verified tokens cut off by the end of the text.")
    preemptions: int
    cycles: int = Field(description="Steps that verified tokens; standard decoding takes one each.")
    verified_per_cycle: float | None = Field(description="null where there was no cycle.")
    decode_seconds: float = Field(description="Its shares of the engine's decoding steps.")
    baseline_seconds: float | None = Field(
        description="What standard decoding is estimated to take for the same tokens; null where "
        "the server has not timed it."
    )
    estimated_speedup: float | None = Field(description="The ratio of the two.")


class ReplyBody(BaseModel):
    """What every body and every chunk of a stream begins with."""

    id: str
    object: str
    created: int
    model: str
    usage: Usage | None = None
    cos: CosReport | None = None

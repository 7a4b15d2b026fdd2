"""Configuration as frozen pydantic models; whatever needs a section is passed it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

VerificationName = Literal["token", "block"]
StrategyName = Literal["standard", "single", "speculative", "cos", "mixture", "auto"]
Finite = Annotated[float, Field(allow_inf_nan=False)]

# Among proposers in metrics and replies; no model may be called so.
LOOKUP_NAME = "prompt_lookup"


def _off_is_a_word(value: object) -> object:
    """YAML reads a bare `off` as false, and `on` as true."""
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value


class Section(BaseModel):
    """Frozen, strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Section):
    """One member of the ensemble. The order in `models` is the proposal order: cheapest first."""

    name: str = Field(
        description="Name of this member in metrics and logs.", pattern=r"^[A-Za-z0-9._-]{1,64}$"
    )
    path: str = Field(
        description="Directory, GGUF file or hub id of the weights; what begins with models/ is "
        "never looked for on a hub.",
        min_length=1,
    )
    revision: str | None = Field(
        None,
        description="Of a hub id: commit, tag or branch; the default branch if null.",
        min_length=1,
    )
    device: str = Field(
        "auto", description="One torch device, as cpu or cuda:1; auto: cuda if present, else cpu."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Weights' dtype; auto is bfloat16 on GPU and float32 on CPU, where weights are "
        "kept in 16 bits if that is exact. bfloat16 is faster for many texts at once on a CPU that "
        "multiplies it, and rounds: a greedy text may then depend on what is decoded beside it.",
    )
    shortlist: str | None = Field(
        "auto",
        description="JSON list of the token ids this member proposes; the output's law stays the "
        "same. auto: shortlist.json in its directory, if there is one; null: all tokens.",
        min_length=1,
    )


class WeightedConfig(Section):
    """Probability-level ensemble: sum of weight[k] * p_k."""

    method: Literal["weighted"] = Field(description="Names the combination.")
    weights: tuple[Finite, ...] = Field(
        fail_fast=True,
        description="One weight for each model, none negative, summing to 1.",
    )


class ContrastiveConfig(Section):
    """Logit-level contrast of the last model (expert) with the first (amateur)."""

    method: Literal["contrastive"] = Field(description="Names the combination.")
    mu: Finite = Field(0.1, ge=0, le=10, description="Contrastive strength, paper eq. 5.")
    plausibility: Finite = Field(
        0.0,
        ge=0,
        lt=1,
        description="Drop tokens below this fraction of the expert's top probability.",
    )


class LinearConfig(Section):
    """Logit-level mix: softmax of the sum of weight[k] * logits_k."""

    method: Literal["linear"] = Field(description="Names the combination.")
    weights: tuple[Finite, ...] = Field(
        fail_fast=True,
        description="One weight for each model; negative ones contrast.",
    )


CombinationConfig = Annotated[
    WeightedConfig | ContrastiveConfig | LinearConfig, Field(discriminator="method")
]


class PromptLookupConfig(Section):
    """Proposals without a model: what followed the last tokens where they stood before."""

    max_ngram: int = Field(4, ge=1, le=32, description="Last tokens that are looked for, at most.")
    min_ngram: int = Field(2, ge=1, le=32, description="How many of them must be found.")
    max_tokens: int | None = Field(
        None, ge=1, description="Tokens proposed at once; decoding.max_gamma if null."
    )

    @model_validator(mode="after")
    def _lengths_in_order(self) -> PromptLookupConfig:
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram {self.min_ngram} is above max_ngram {self.max_ngram}")
        return self


class DecodingConfig(Section):
    """Who advances next, and how far proposals run ahead."""

    strategy: StrategyName = Field(
        "auto",
        description="Which model advances next; auto takes what is fastest by measurement, "
        "standard decoding included.",
    )
    gamma: (
        Literal["auto"] | Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], ...]
    ) = Field(
        "auto",
        description="Proposal length of each model; a single number is the first model's, and the "
        "others then propose their bonus token alone. auto takes the lengths that are fastest.",
    )
    max_gamma: int = Field(8, ge=1, le=32, description="Longest proposal a request may ask for.")
    single: str | None = Field(
        None, description="Model decoded by strategy single; the last one if null."
    )
    kappa: int = Field(
        0,
        ge=0,
        description="mixture: tokens of others' coins that the first model may draft through.",
    )
    shared_coins: bool = Field(
        True, description="mixture: one coin for the whole batch, where a request allows it."
    )

    verification: VerificationName = Field(
        "token",
        description="How proposals to requests without a seed, at a temperature above 0, are "
        "accepted: block decides those verified together as a whole and keeps more of them, token "
        "one after another. The law of the text is the same. Mixtures always decide by token.",
    )
    prompt_lookup: PromptLookupConfig | None = Field(
        None,
        description="Also propose what followed the last tokens where they stood before in prompt "
        "or text: where that pays under auto, else where it was right of late. The law of the text "
        "is the same. Off if null; {} for its defaults.",
    )

    @model_validator(mode="after")
    def _lookup_within_limit(self) -> DecodingConfig:
        lookup = self.prompt_lookup
        if lookup is not None and (lookup.max_tokens or 0) > self.max_gamma:
            raise ValueError(
                f"prompt_lookup.max_tokens {lookup.max_tokens} is above max_gamma {self.max_gamma}"
            )
        return self

    @model_validator(mode="after")
    def _gamma_within_limit(self) -> DecodingConfig:
        if self.gamma == "auto":
            return self
        longest = self.gamma if isinstance(self.gamma, int) else max(self.gamma, default=0)
        if longest > self.max_gamma:
            raise ValueError(f"gamma {longest} is above max_gamma {self.max_gamma}")
        return self


class ShadowConfig(Section):
    """Windows in which everybody decodes by standard, to measure the speedup over it."""

    every_seconds: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="Seconds of decoding between windows."
    )
    rounds: int = Field(
        8, ge=1, le=1024, description="Tokens of each sequence that a window measures."
    )


class EngineConfig(Section):
    """Sizes of the engine, and what it computes with."""

    max_sequences: int = Field(64, ge=1, le=4096, description="Sequences decoded at once.")
    max_step_tokens: int = Field(
        512, ge=1, description="Tokens one forward may take, prompts and decoding together."
    )
    max_prefill_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Prompt tokens one forward may take while other sequences decode, for each "
        "token of theirs: how long they wait for a long prompt. auto is 128 on CPU and 512 on GPU.",
    )
    prefix_cache: bool = Field(
        True,
        description="Keep the keys and values of finished texts while their memory is not needed, "
        "and find them when another prompt begins alike.",
    )
    max_length: int | None = Field(
        None, ge=2, description="Context length; the models' shortest if null."
    )
    kv_memory: str = Field(
        "auto",
        description="KV memory of all models together, as 2GiB or 512MiB; auto takes half of what "
        "is left free on a CPU, 80 % on a GPU.",
    )
    page_size: int = Field(16, ge=1, le=256, description="Tokens in one page of KV memory.")
    max_waiting: int = Field(
        256,
        ge=1,
        description="Sequences taken beyond max_sequences, which wait; more are refused.",
    )
    calibrate: bool = Field(
        True,
        description="Time forwards at start, some seconds, so that auto can choose and metrics can "
        "estimate the speedup over standard decoding. Without it auto is cos with gamma 2.",
    )
    shadow: ShadowConfig | None = Field(
        None,
        description="Measure the speedup: now and then all sequences but mixtures decode by "
        "standard for some tokens, which costs what that takes. Off if null; {} for its defaults.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads of torch; if null all cores, or what a container gets.",
    )
    attention: Literal["auto", "portable", "triton"] = Field(
        "auto",
        description="Attention of few tokens over long texts: torch's own operations, or kernels: "
        "Triton's on a GPU, on a CPU those of cpu_kernels; auto takes the kernels where they run.",
    )
    cpu_kernels: Literal["auto", "off", "on"] = Field(
        "auto",
        description="Kernels for CPUs, compiled by Numba at start, for products, attention, what "
        "layers do between them, and for deciding tokens. auto: where Numba is installed and they "
        "give what torch's operations give; on: refuse to start elsewhere.",
    )
    cuda_graphs: Literal["auto", "off", "static"] = Field(
        "auto",
        description="Capture decoding steps as CUDA graphs: auto does on a GPU with Triton; static "
        "pads steps as for capturing and runs them as they are, to find faults.",
    )
    run_ahead: Literal["auto", "off", "on"] = Field(
        "auto",
        description="Enqueue drafting and scoring without waiting, and read the drafted tokens "
        "together with what became of them: auto does where all models are on GPUs. Texts keep "
        "their law, and greedy and seeded ones every token; they are told beside the next forward, "
        "which on a CPU is after it.",
    )
    half_batches: Literal["auto", "off", "on"] = Field(
        "auto",
        description="Where models are on several GPUs, let one score for half of the sequences "
        "while another drafts for the rest: auto does where the measured seconds promise that it "
        "pays; on: refuse to start where they are not. Texts keep their law, and greedy and seeded "
        "ones every token.",
    )
    compile: Literal["off", "layers"] = Field(
        "off",
        description="layers: let torch.compile join the small operations of Llama-shaped models' "
        "layers, before graphs are captured. Takes some seconds to a minute at start and pays on "
        "a GPU, if anywhere; 16-bit weights on a CPU are not compiled.",
    )

    _words = field_validator(
        "cpu_kernels", "cuda_graphs", "compile", "run_ahead", "half_batches", mode="before"
    )(_off_is_a_word)

    @field_validator("kv_memory")
    @classmethod
    def _kv_memory_parses(cls, value: str) -> str:
        if value != "auto":
            parse_bytes(value)
        return value


# Eleven days: timers of sockets and of event loops take no more than some weeks.
_MOST_SECONDS = 1e6


class HttpConfig(Section):
    """The HTTP surface and its limits."""

    # Empty would be all addresses.
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    keys_file: str | None = Field(
        None, min_length=1, description="File of API keys, `key` or `name:key` on each line."
    )
    keys_env: str = Field(
        "COS_API_KEYS",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable with further API keys, where it is set. Without any key "
        "everybody is served.",
    )
    tls_certificate: str | None = Field(
        None, min_length=1, description="PEM file of the certificate chain; HTTPS where given."
    )
    tls_key: str | None = Field(
        None, min_length=1, description="PEM file of its private key; in the former if null."
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="Origins whose pages may call, as https://app.example; or * for all."
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="Port of its own for /metrics, which needs no key there."
    )
    metrics_host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen on for metrics_port."
    )
    max_open_requests: int = Field(
        512, ge=1, description="POST requests open at once, streams included."
    )
    max_open_requests_per_key: int | None = Field(
        None, ge=1, description="The same for each API key's name."
    )
    tokens_per_minute_per_key: int | None = Field(
        None,
        ge=1,
        description="Prompt and generated tokens of each API key's name, counted as they come.",
    )
    request_seconds: float = Field(
        600.0, gt=0, le=_MOST_SECONDS, description="Time from queueing a request to its last token."
    )
    body_seconds: float = Field(
        30.0, gt=0, le=_MOST_SECONDS, description="Time a client gets to send its body."
    )
    keep_alive_seconds: int = Field(
        75,
        ge=1,
        description="Time a connection stays open unused; longer than proxies keep theirs, which "
        "would otherwise send into one that is being closed.",
    )
    send_seconds: float = Field(
        60.0,
        gt=0,
        le=_MOST_SECONDS,
        description="Time a client may leave a stream unread before it is cut.",
    )
    max_header_bytes: int = Field(
        64 << 10, ge=1024, description="Size of a request's line and headers together."
    )
    max_body_bytes: int = Field(4 << 20, ge=1024, description="Largest request body.")
    max_prompts: int = Field(64, ge=1, description="Prompts in one request.")
    max_n: int = Field(128, ge=1, le=128, description="Choices for each prompt.")
    max_choices: int = Field(128, ge=1, description="Prompts times n in one request.")
    max_prompt_chars: int = Field(
        1 << 20, ge=1, description="Characters of text in one request, before it is tokenised."
    )
    template_seconds: float = Field(
        10.0,
        gt=0,
        le=_MOST_SECONDS,
        description="Time the chat template gets to render one conversation.",
    )
    tool_call_parser: Literal["auto", "off", "hermes", "llama3_json"] = Field(
        "auto",
        description="How the last model writes calls of tools; auto asks its chat template, and "
        "with off, or where it does not say, calls stay text.",
    )
    allow_priority: bool = Field(
        False, description="Let requests choose their place in the queue by priority."
    )
    max_stop: int = Field(16, ge=0, description="Stop strings in one request.")
    max_stop_chars: int = Field(256, ge=1, description="Characters in one stop string.")
    max_logprobs: int = Field(20, ge=0, description="Alternatives reported for each token.")
    max_prompt_scores: int = Field(
        1 << 19,
        ge=1,
        description="Log-probabilities of prompts in one answer: tokens of all prompts, times "
        "choices, times alternatives and one.",
    )
    max_logit_bias: int = Field(1024, ge=0, description="Entries in logit_bias.")
    max_bad_words: int = Field(128, ge=0, description="Texts in bad_words.")
    max_grammar_bytes: int = Field(
        64 << 10,
        ge=1,
        le=1 << 20,
        description="Length of a schema, regular expression or grammar; 1 MiB at most, for the "
        "threads that read them have stacks of 2,048 times as much.",
    )
    grammar_seconds: float = Field(
        10.0, gt=0, le=_MOST_SECONDS, description="Time to read one of them."
    )
    ping_seconds: int = Field(
        15,
        ge=1,
        description="Interval of SSE keep-alive comments; a stream begins after it, token or not.",
    )
    drain_seconds: float = Field(
        30.0, ge=0, le=_MOST_SECONDS, description="Time running requests get to finish at shutdown."
    )

    _words = field_validator("tool_call_parser", mode="before")(_off_is_a_word)


class TracingConfig(Section):
    """OpenTelemetry traces; needs the extra `otel`."""

    endpoint: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="Where traces go by OTLP over HTTP, as in http://localhost:4318/v1/traces.",
    )
    sample_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of requests that are traced, where the client does not say it.",
    )


class ServerConfig(Section):
    """The whole of one configs/*.yaml."""

    served_model_name: str = Field(
        description="The name clients use.", pattern=r"^[A-Za-z0-9._:/-]{1,128}$"
    )
    models: tuple[ModelConfig, ...] = Field(
        min_length=1, max_length=8, description="Members, cheapest first."
    )
    combination: CombinationConfig = Field(description="How the members' scores become one.")
    decoding: DecodingConfig = Field(DecodingConfig(), description="Strategy and proposal lengths.")
    engine: EngineConfig = Field(EngineConfig(), description="Sizes, memory and kernels.")
    http: HttpConfig = Field(HttpConfig(), description="Address, keys and limits.")
    tracing: TracingConfig = Field(TracingConfig(), description="Where traces go.")

    @model_validator(mode="after")
    def _members_agree(self) -> ServerConfig:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"models: names must differ, got {names}")
        if LOOKUP_NAME in names:
            raise ValueError(f"models: no model can be called {LOOKUP_NAME}")
        gamma = self.decoding.gamma
        if isinstance(gamma, tuple) and len(gamma) != len(names):
            raise ValueError(f"decoding.gamma has {len(gamma)} entries for {len(names)} models")
        if self.engine.max_step_tokens < self.decoding.max_gamma + len(names):
            raise ValueError(
                "engine.max_step_tokens must be at least decoding.max_gamma plus the number of "
                f"models ({self.decoding.max_gamma} + {len(names)})"
            )
        if self.decoding.single is not None and self.decoding.single not in names:
            raise ValueError(f"decoding.single is {self.decoding.single!r}, models are {names}")
        return self


_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_bytes(text: str) -> int:
    """`2GiB` -> 2147483648. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])

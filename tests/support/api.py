"""Apps over table LMs: the real engine, the real HTTP surface, no weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from jinja2 import TemplateError
from llguidance import LLTokenizer
from llguidance._tokenizer import TokenizerWrapper
from torch import Tensor

from server.api.chat_template import Turns
from server.api.service import Service
from server.app import create_app
from server.config import ServerConfig
from server.config_file import parse_config
from server.decoding.grammar import Grammars
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.metrics import Metrics
from server.runner.base import Batch
from server.tracing import RequestTracer
from tests.support.table_lm import DigitDecoder, TableLM, TableRunner

VOCAB_SIZE = 36
EOS = 35
MAX_LENGTH = 256
MODEL = "table"
# The only token that is allowed is banned: no distribution is left, and the generation fails.
IMPOSSIBLE: dict[str, Any] = {"allowed_token_ids": [3], "bad_words": ["3"]}


@dataclass
class Encoding:
    ids: list[int]


class DigitTokenizer(DigitDecoder):
    """The inverse of DigitDecoder: "1 2 a" is 1, 2, 10; other characters are refused."""

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoding:
        return Encoding([int(character, 36) for character in sequence if character != " "])

    def encode_batch_fast(
        self, input: list[str], *, add_special_tokens: bool = True
    ) -> list[Encoding]:
        return [self.encode(each, add_special_tokens=add_special_tokens) for each in input]

    def decode_batch(
        self, sequences: list[list[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        return [self.decode(each, skip_special_tokens) for each in sequences]

    def get_vocab_size(self) -> int:
        return VOCAB_SIZE

    def id_to_token(self, id: int) -> str | None:
        return self.decode([id])


def make_grammars() -> Grammars:
    """Over the vocabulary of DigitTokenizer."""

    class Vocabulary:
        eos_token_id, bos_token_id = EOS, None
        special_token_ids = (EOS,)
        tokens = tuple(DigitTokenizer().decode([i]).encode() for i in range(VOCAB_SIZE))

        def __call__(self, text: str | bytes) -> list[int]:
            return DigitTokenizer().encode(text if isinstance(text, str) else text.decode()).ids

    wrapper = TokenizerWrapper(Vocabulary())
    return Grammars(lambda eos: LLTokenizer(wrapper, eos_token=eos), frozenset({EOS}), VOCAB_SIZE)


class LetterTemplate:
    """Each message as one letter for its role and its content, after a "t" for each tool.

    `shout` doubles the content, `seconds` is how long it keeps a processor busy.
    """

    def __init__(self) -> None:
        self.num_ended = 0

    source = "role content shout seconds tools tokenize bos_token"

    def render(self, turns: Turns) -> str:
        if turns.messages[0]["role"] == "nobody":
            raise TemplateError("nobody may not speak")
        end = time.monotonic() + float(turns.variables.get("seconds") or 0)
        try:
            while time.monotonic() < end:
                pass
        finally:
            self.num_ended += 1
        times = 2 if turns.variables.get("shout") else 1
        letters = [m["role"][0] + " " + m["content"] * times for m in turns.messages]
        return " ".join([*["t"] * len(turns.tools or ()), *letters, *["a"] * turns.opens_reply])


class PacedRunner(TableRunner):
    """Takes `seconds` for a forward, and fails when told to."""

    seconds = 0.0
    failure: Exception | None = None
    fail_after: int | None = None

    def forward(self, batch: Batch) -> Tensor:
        if self.seconds:
            time.sleep(self.seconds)
        if self.failure is not None or self.num_forwards == self.fail_after:
            raise self.failure or RuntimeError("told to fail")
        return super().forward(batch)


def make_config(num_models: int = 2, **sections: Any) -> ServerConfig:
    members = [{"name": f"m{k}", "path": "unused"} for k in range(num_models)]
    weights = [1 / num_models] * num_models
    defaults = {
        "served_model_name": MODEL,
        "models": members,
        "combination": {"method": "weighted", "weights": weights},
    }
    return parse_config({**defaults, **sections})


@dataclass
class TableApp:
    """An app and what stands behind it."""

    app: FastAPI
    config: ServerConfig
    engine: Engine
    metrics: Metrics
    runners: list[PacedRunner] = field(default_factory=list)

    @property
    def service(self) -> Service:
        service: Service = self.app.state.service
        return service

    def set_pace(self, seconds: float) -> None:
        for runner in self.runners:
            runner.seconds = seconds

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    @property
    def is_idle(self) -> bool:
        """No sequence anywhere and every page back."""
        return not self.engine.has_work and not any(self.engine.scheduler.pages.num_used())


def make_engine(config: ServerConfig, metrics: Metrics) -> tuple[Engine, list[PacedRunner]]:
    runners = [
        PacedRunner(TableLM(k, VOCAB_SIZE), f"m{k}", max_length=MAX_LENGTH)
        for k in range(len(config.models))
    ]
    limits = EngineLimits(
        max_sequences=config.engine.max_sequences,
        max_gamma=config.decoding.max_gamma,
        max_waiting=config.engine.max_waiting,
        cpu_kernels=config.engine.cpu_kernels,
    )
    engine = Engine(runners, DigitDecoder(), frozenset({EOS}), limits, on_step=metrics.observe_step)
    engine.on_fault = metrics.engine.observe_fault
    return engine, runners


def make_table_app(
    num_models: int = 2,
    on_failure: Callable[[BaseException], None] | None = None,
    has_template: bool = True,
    has_grammars: bool = True,
    tracer: RequestTracer | None = None,
    **sections: Any,
) -> TableApp:
    """`sections` are top-level entries of the configuration."""
    config = make_config(num_models, **sections)
    metrics = Metrics(config)
    engine, runners = make_engine(config, metrics)
    app = create_app(
        config,
        AsyncEngine(engine),
        DigitTokenizer(),
        LetterTemplate() if has_template else None,
        grammars=make_grammars() if has_grammars else None,
        metrics=metrics,
        tracer=tracer,
        on_failure=on_failure,
    )
    return TableApp(app, config, engine, metrics, runners)


def usage(num_prompt: int, num_generated: int, num_cached: int = 0) -> dict[str, Any]:
    """As a reply tells it."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }

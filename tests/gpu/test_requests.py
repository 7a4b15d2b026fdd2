"""Requests of every kind write what they write on the CPU, each model on a GPU of its own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, LookupParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.runner.graph_runner import GraphRunner
from server.runner.loader import LoadedModels
from tests.support.engines import generated, make_decoding, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none"),
]
WEIGHTED = Combination.weighted([0.4, 0.6])
COS = make_decoding("cos", Combination.contrastive(2, 0.1, 0.1), 4)
DECODINGS: dict[str, DecodingParams] = {
    "standard": make_decoding("standard", Combination.linear([0.3, 0.7])),
    "by token": make_decoding("cos", WEIGHTED, (3, 2), verification="token"),
    "by block": COS,
    "lookup": replace(COS, lookup=LookupParams(3, 1, 4)),
    "auto": replace(make_decoding("auto", WEIGHTED), is_gamma_auto=True),
    "mixture": make_decoding("mixture", WEIGHTED, 4, 1),
    "shared coins": make_decoding("mixture", WEIGHTED, 4, 1, shared_coins=True),
}
REQUESTS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"top_p": 0.8, "top_k": 9},
    {"min_p": 0.05, "temperature": 1.3},
    {"frequency_penalty": 0.6, "presence_penalty": 0.1, "repetition_penalty": 1.2},
    {"bad_words": ((3, 4), (5,)), "min_tokens": 6},
    {"logit_bias": ((2, 1.5), (9, -4.0)), "logprobs": 2},
    {"allowed_token_ids": tuple(range(40, 90)), "prompt_logprobs": 1},
)


def texts(
    loaded: LoadedModels, name: str, count: int, steps: list[StepStats], **limits: Any
) -> list[tuple[tuple[int, ...], Any]]:
    """Tokens of the first `count` requests and how their texts end."""
    engine = Engine(
        loaded.runners,
        loaded.tokenizer.backend_tokenizer,
        loaded.eos_token_ids,
        EngineLimits(max_sequences=8, max_step_tokens=24, **limits),
        on_step=steps.append,
        coin_seed=4,
    )
    sequences = [
        Sequence.start(
            str(i),
            [5, 9, 31 + i] * (1 + i),
            SamplingParams(max_tokens=9, seed=i, **asked),
            DECODINGS[name],
        )
        for i, asked in enumerate(REQUESTS[:count])
    ]
    deltas = run(engine, sequences, engine.scheduler.check_integrity)
    return [(generated(deltas[s.id]), deltas[s.id][-1].finish_reason) for s in sequences]


def check(
    load: Callable[..., LoadedModels],
    gpus: LoadedModels,
    name: str,
    count: int = len(REQUESTS),
    **limits: Any,
) -> bool:
    """Texts on `gpus` are those of the CPU; returns whether steps overlapped."""
    steps: list[StepStats] = []
    made = texts(gpus, name, count, steps, **limits)
    assert made == texts(load("cpu", attention="portable"), name, count, [])
    assert {end for _, end in made} <= {"length", "stop"}
    return any(step.overlaps for step in steps)


@pytest.mark.parametrize("name", DECODINGS)
def test_texts_are_those_of_the_cpu(load: Callable[..., LoadedModels], name: str) -> None:
    assert not check(load, load("cuda:0", "cuda:1", attention="portable"), name)


def test_texts_of_half_batches_too(load: Callable[..., LoadedModels]) -> None:
    assert check(load, load("cuda:0", "cuda:1", attention="portable"), "lookup", half_batches=True)


def test_texts_by_kernels_and_graphs_too(load: Callable[..., LoadedModels]) -> None:
    """Halves of two fit into what was captured."""
    gpus = load("cuda:0", "cuda:1", max_sequences=2)
    assert all(isinstance(runner, GraphRunner) and runner.num_graphs for runner in gpus.runners)
    assert check(load, gpus, "by block", count=4, half_batches=True)

"""Drafting without waiting: the same texts, and how often the host waits."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.config_file import parse_config
from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.decoding import verify
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.runner.base import Batch
from server.runner.loader import load_models
from tests.support.engines import generated, make_decoding, make_engine, run
from tests.support.exact import Z_LIMIT, chi_square_z, exact_law
from tests.support.table_lm import DigitDecoder, TableLM, TableRunner
from tests.support.tiny_models import make_pair

WEIGHTED = Combination.weighted([0.4, 0.6])
DECODINGS = {
    "standard": make_decoding("standard", WEIGHTED),
    "speculative": make_decoding("speculative", WEIGHTED, gamma=4),
    "cos": make_decoding("cos", WEIGHTED, gamma=(3, 2), verification="token"),
    "blocks": make_decoding("cos", WEIGHTED, gamma=4),
    "contrastive": make_decoding("cos", Combination.contrastive(2, 0.3), 3, verification="token"),
    "three": make_decoding("cos", Combination.weighted([0.3, 0.3, 0.4]), gamma=(3, 2, 1)),
    "mixture": make_decoding("mixture", WEIGHTED, gamma=4, kappa=2),
    "shared coins": make_decoding("mixture", WEIGHTED, gamma=4, kappa=1, shared_coins=True),
}
# What a request may ask for; some have proposals that the host has to know at once.
REQUESTS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"is_seeded": True},
    {"top_p": 0.8, "top_k": 9},
    {"frequency_penalty": 0.6},
    {"bad_words": ((3, 4), (5,))},
    {"min_tokens": 6, "logit_bias": ((2, 1.5),)},
    {"prompt_logprobs": 1},
)


def texts(
    decoding: DecodingParams, runs_ahead: bool, steps: list[StepStats], **limits: Any
) -> list[tuple[int, ...]]:
    rng = random.Random(3)
    num_models = len(decoding.gamma)
    is_exact = decoding.combination.method != "weighted" or decoding.strategy != "mixture"
    sequences = [
        Sequence.start(
            f"s{i}",
            [rng.randrange(20) for _ in range(rng.randrange(1, 20))],
            SamplingParams(
                max_tokens=rng.randrange(1, 25),
                seed=i,
                logprobs=2 if is_exact and i % 5 == 0 else None,
                **REQUESTS[i % len(REQUESTS)],
            ),
            decoding,
        )
        for i in range(21)
    ]
    engine = make_engine(
        [TableLM(70 + k, vocab_size=20) for k in range(num_models)],
        eos=frozenset({7}),
        on_step=steps.append,
        runs_ahead=runs_ahead,
        coin_seed=4,
        **limits,
    )
    deltas = run(engine, sequences, engine.scheduler.check_integrity)
    return [generated(deltas[sequence.id]) for sequence in sequences]


@pytest.fixture
def reading_waits(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What a GPU is asked, asked of the CPU; undone by the returned one."""
    monkeypatch.setattr(verify, "reading_waits", lambda device: True)
    return monkeypatch


@pytest.mark.parametrize("name", DECODINGS)
def test_texts_are_those_of_reading_each_token(
    name: str, reading_waits: pytest.MonkeyPatch
) -> None:
    """Whatever requests ask for, and with a batch that is preempted and read in chunks."""
    for limits in ({}, {"num_pages": 24, "max_step_tokens": 11}):
        at_once: list[StepStats] = []
        later: list[StepStats] = []
        made = texts(DECODINGS[name], True, later, **limits)
        with reading_waits.context() as context:
            context.setattr(verify, "reading_waits", lambda device: False)
            assert made == texts(DECODINGS[name], False, at_once, **limits)
        counted = [
            [(s.model, s.num_tokens, s.num_proposed, s.tails, s.num_drawn) for s in steps]
            for steps in (at_once, later)
        ]
        assert counted[0] == counted[1]
        assert bool(limits) == any(step.num_preempted for step in later)


@pytest.mark.usefixtures("reading_waits")
def test_law() -> None:
    decoding = DECODINGS["cos"]
    lms = [TableLM(seed=11 + k) for k in range(len(decoding.gamma))]
    engine = make_engine(lms, max_sequences=500, max_step_tokens=4096, runs_ahead=True)
    params = [SamplingParams(max_tokens=4, seed=seed) for seed in range(2000)]
    sequences = [Sequence.start(f"s{p.seed}", [0, 2, 1], p, decoding) for p in params]
    deltas = run(engine, sequences)
    samples = [generated(deltas[sequence.id]) for sequence in sequences]
    law = exact_law(lms, decoding.combination, params[0], [0, 2, 1])
    assert chi_square_z(samples, law) < Z_LIMIT


class SometimesBroken(TableRunner):
    """Its scores after some texts are NaN."""

    def forward(self, batch: Batch) -> Tensor:
        scores = super().forward(batch)
        scores[scores[:, 0] > 1.0] = torch.nan
        return scores


@pytest.mark.parametrize("strategy", ["speculative", "cos"])
def test_where_a_proposer_has_nothing_to_propose_the_token_is_drawn(strategy: str) -> None:
    """It scores nothing, so its failures are nobody's; found only when the draft is read."""
    decoding = make_decoding(strategy, Combination.weighted([0.0, 1.0]), gamma=(4, 0))
    results, declined = [], []
    for runs_ahead in (False, True):
        runners = [SometimesBroken(TableLM(1, 9)), TableRunner(TableLM(2, 9))]
        limits = EngineLimits(runs_ahead=runs_ahead)
        engine = Engine(runners, DigitDecoder(), frozenset(), limits)
        sequences = [
            Sequence.start(f"s{i}", [i], SamplingParams(max_tokens=20, seed=i), decoding)
            for i in range(9)
        ]
        deltas = run(engine, sequences, engine.scheduler.check_integrity)
        assert all(deltas[s.id][-1].finish_reason == "length" for s in sequences)
        results.append([generated(deltas[s.id]) for s in sequences])
        declined.append([s.stats.num_drawn for s in sequences])
        assert all(s.stats.proposed[0] >= s.stats.verified[0] > 0 for s in sequences)
    assert results[0] == results[1]
    assert declined[0] == declined[1]
    assert sum(declined[0]) > 9


def test_aborting_while_the_host_is_ahead_leaves_nothing_behind() -> None:
    rng = random.Random(2)
    steps: list[StepStats] = []
    lms = [TableLM(70 + k, vocab_size=20) for k in range(2)]
    engine = make_engine(lms, runs_ahead=True, on_step=steps.append, num_pages=60)
    for i in range(30):
        params = SamplingParams(max_tokens=12, seed=i)
        engine.add(Sequence.start(f"s{i}", [i % 20] * (1 + i % 7), params, DECODINGS["cos"]))
    alive = [f"s{i}" for i in range(30)]
    num_steps = 0
    while engine.has_work:
        engine.step()
        num_steps += 1
        engine.scheduler.check_integrity()
        if alive and rng.random() < 0.4:
            engine.abort(alive.pop(rng.randrange(len(alive))))
    assert engine.scheduler.pages.num_used() == (0, 0)
    assert len(steps) == num_steps


class TooLarge(TableRunner):
    """Its forwards do not fit into memory once it has run for a while."""

    def forward(self, batch: Batch) -> Tensor:
        if self.num_forwards > 5:
            raise MemoryError
        return super().forward(batch)


def test_steps_are_observed_before_the_engine_idles() -> None:
    """Else the next request's arrival would seem to be part of them."""
    steps: list[StepStats] = []
    runners = [TableRunner(TableLM(1, 9)), TooLarge(TableLM(2, 9))]
    limits = EngineLimits(runs_ahead=True)
    engine = Engine(runners, DigitDecoder(), frozenset(), limits, on_step=steps.append)
    engine.add(Sequence.start("s", [1], SamplingParams(max_tokens=40), DECODINGS["cos"]))
    last = [engine.step() for _ in iter(lambda: engine.has_work, False)][-1]
    assert last[0].finish_reason == "error"
    assert not engine.observer.is_ahead
    assert len(steps) == sum(runner.num_forwards for runner in runners)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was called of all that makes a host wait for a GPU."""
    called: list[str] = []

    def watch(name: str) -> None:
        inner: Callable[..., Any] = getattr(Tensor, name)

        def watched(tensor: Tensor, *args: Any) -> Any:
            called.append(name)
            return inner(tensor, *args)

        monkeypatch.setattr(Tensor, name, watched)

    for name in ("tolist", "item", "nonzero", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        watch(name)
    return called


@pytest.mark.usefixtures("reading_waits")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("graphs", ["off", "static"])
def test_a_cycle_waits_once(
    graphs: str, temperature: float, waits: list[str], tmp_path: Path
) -> None:
    loaded = load_models(
        parse_config(
            {
                "served_model_name": "tiny",
                "models": [
                    {"name": f"m{k}", "path": str(path)}
                    for k, path in enumerate(make_pair(tmp_path))
                ],
                "combination": {"method": "contrastive"},
                "engine": {"kv_memory": "16MiB", "max_length": 96, "cuda_graphs": graphs},
            }
        )
    )
    decoding = make_decoding("cos", Combination.contrastive(2, 0.1), (4, 0), verification="token")
    made: list[list[tuple[int, ...]]] = []
    for runs_ahead in (False, True):
        steps: list[StepStats] = []
        limits = EngineLimits(runs_ahead=runs_ahead)
        engine = Engine(
            loaded.runners,
            loaded.tokenizer.backend_tokenizer,
            frozenset(),
            limits,
            on_step=steps.append,
        )
        sequences = [
            Sequence.start(
                f"s{i}",
                [5 + i, 9],
                SamplingParams(
                    max_tokens=30, temperature=temperature, top_p=0.9, seed=i, ignore_eos=True
                ),
                decoding,
            )
            for i in range(3)
        ]
        for sequence in sequences:
            engine.add(sequence)
        deltas: dict[str, list[int]] = {sequence.id: [] for sequence in sequences}
        per_step: list[tuple[int, bool]] = []
        while engine.has_work:
            waits.clear()
            for delta in engine.step():
                deltas[delta.sequence_id] += delta.token_ids
            per_step.append((len(waits), runs_ahead and engine.observer.is_ahead))
        made.append([tuple(deltas[s.id]) for s in sequences])
        if runs_ahead:
            cycles = [step for step in steps if step.tails and not step.num_drawn]
            assert len(cycles) > 5
            for (count, is_ahead), step in zip(per_step, steps, strict=True):
                assert count == (0 if is_ahead else bool(step.tails) + bool(step.num_drawn))
            assert sum(is_ahead for _, is_ahead in per_step) > 2 * len(cycles)
    assert made[0] == made[1]

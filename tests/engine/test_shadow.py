"""Standard decoding measured on the live load: the law stays, and what is counted is true."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from server.config import EngineConfig
from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import Delivery, StepStats
from server.decoding.strategies import SharedCoins, Strategies
from server.engine import shadow
from server.engine.controller import Controller
from server.engine.cost_table import CostTable, Timings
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.runner.base import Batch
from tests.engine.test_controller import auto, capricious, make_costs
from tests.support.engines import decode, generated, make_decoding, make_engine, run
from tests.support.exact import Z_LIMIT, chi_square_z, exact_law
from tests.support.table_lm import DigitDecoder, TableLM, TableRunner

PROMPT = [0, 2, 1]
WEIGHTED = Combination.weighted([0.3, 0.7])
CONTRASTIVE = Combination.contrastive(2, 0.4)
PROPOSER, EXPERT = 0.25, 1.0  # seconds of a forward of one token of each sequence; exact in binary
MORE = 0.125  # for each token of a sequence above one


def toggle(engine: Engine) -> Callable[[], None]:
    """Windows open and close at random, between any two steps."""
    rng = random.Random(5)

    def after_step() -> None:
        if rng.random() < 0.3:
            engine._strategies.is_shadowing = not engine._strategies.is_shadowing

    return after_step


@pytest.mark.parametrize(
    ("decoding", "is_seeded"),
    [
        (make_decoding("cos", WEIGHTED, 2), False),
        (make_decoding("speculative", CONTRASTIVE, 3), False),
        (make_decoding("cos", CONTRASTIVE, (2, 2)), True),
        (auto(WEIGHTED), False),
    ],
)
def test_law_with_windows_at_random_times(decoding: DecodingParams, is_seeded: bool) -> None:
    lms = [TableLM(seed=11 + k) for k in range(2)]
    if decoding.is_auto:
        engine, _ = capricious(lms, decoding, by_history=False)
    else:
        engine = make_engine(lms, max_sequences=50)
    params = [SamplingParams(max_tokens=5, seed=s, is_seeded=is_seeded) for s in range(700)]
    sequences = [Sequence.start(f"s{i}", PROMPT, p, decoding) for i, p in enumerate(params)]
    deltas = run(engine, sequences, toggle(engine))
    samples = [generated(deltas[sequence.id]) for sequence in sequences]
    assert chi_square_z(samples, exact_law(lms, decoding.combination, params[0], PROMPT)) < Z_LIMIT
    used = {strategy for sequence in sequences for strategy in sequence.stats.strategies}
    assert {"standard", "cos" if decoding.is_auto else decoding.strategy} <= used
    engine.scheduler.check_integrity()


def test_a_window_moves_nobody_off_a_coin_that_was_looked_at() -> None:
    strategies = Strategies(SharedCoins(0))
    first, second = (
        Sequence.start(f"s{k}", PROMPT, SamplingParams(), auto(WEIGHTED, mixture=True))
        for k in range(2)
    )
    mixture = make_decoding("mixture", WEIGHTED, shared_coins=True)
    for sequence in (first, second):
        sequence.schedule = mixture
        strategies.shared_coins.join(sequence)
    strategies.is_shadowing = True
    strategies.of(first).next_model(first)
    assert not strategies.settle(second)
    assert second.schedule == mixture
    second.draw(1)
    strategies.settle(second)
    assert (second.schedule.strategy, second.coin_base) == ("standard", None)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"is_seeded": True}])
@pytest.mark.parametrize("strategy", ["cos", "speculative", "auto"])
def test_fixed_texts_do_not_depend_on_windows(strategy: str, params: dict[str, float]) -> None:
    lms = [TableLM(seed=40 + k, vocab_size=12) for k in range(2)]
    each = [SamplingParams(max_tokens=20, seed=seed, **params) for seed in range(6)]  # type: ignore[arg-type]
    plain = decode(make_engine(lms), PROMPT, each, make_decoding("standard", CONTRASTIVE))
    engine = make_engine(lms)
    decoding = make_decoding(strategy, CONTRASTIVE)
    assert decode(engine, PROMPT, each, decoding, toggle(engine)) == plain


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedRunner(TableRunner):
    """Takes the clock's time for each forward, and nothing else does."""

    def __init__(self, clock: Clock, lm: TableLM, seconds: float) -> None:
        super().__init__(lm, max_length=1024)
        self._clock = clock
        self._seconds = seconds

    def forward(self, batch: Batch) -> Tensor:
        most = max(len(span.token_ids) for span in batch.spans)
        self._clock.now += self._seconds + MORE * (most - 1)
        return super().forward(batch)


def timed_engine(
    steps: list[StepStats], *, every_seconds: float | None = 8.0, runs_ahead: bool = False
) -> Engine:
    clock = Clock()
    runners = [
        TimedRunner(clock, TableLM(seed=40 + k, vocab_size=12), seconds)
        for k, seconds in enumerate((PROPOSER, EXPERT))
    ]
    limits = EngineLimits(runs_ahead=runs_ahead)
    engine = Engine(runners, DigitDecoder(), frozenset(), limits, on_step=steps.append, clock=clock)
    if every_seconds is not None:
        engine.measure_standard(every_seconds, rounds=3)
    return engine


def texts(decoding: DecodingParams, num: int, max_tokens: int = 50) -> list[Sequence]:
    return [
        Sequence.start(f"s{i}", PROMPT, SamplingParams(max_tokens=max_tokens, seed=i), decoding)
        for i in range(num)
    ]


@pytest.mark.parametrize("num", [1, 4])
@pytest.mark.parametrize("strategy", ["cos", "speculative", "auto"])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_it_measures_what_standard_takes(strategy: str, num: int, runs_ahead: bool) -> None:
    steps: list[StepStats] = []
    engine = timed_engine(steps, runs_ahead=runs_ahead)
    sequences = texts(make_decoding(strategy, CONTRASTIVE, 2), num)
    run(engine, sequences)
    counted = [step.shadow for step in steps if step.shadow is not None]
    assert len(counted) == len(steps)
    tokens = sum(shadow.standard_tokens for shadow in counted)
    seconds = sum(shadow.standard_seconds for shadow in counted)
    windows = [shadow.outcome for shadow in counted if shadow.outcome is not None]
    assert windows
    assert set(windows) == {"measured"}
    assert tokens >= 3 * len(windows)
    if num == 1:
        assert seconds / tokens == PROPOSER + EXPERT
        assert tokens == 3 * len(windows)
    else:
        # One round for all of the batch, but for texts that have ended.
        assert (PROPOSER + EXPERT) / num <= seconds / tokens < (PROPOSER + EXPERT) / num * 1.5
    between = [
        (sum(delivery.num_decoded for delivery in step.deliveries), step.shadow)
        for step in steps
        if step.shadow is not None and step.shadow.decode_seconds
    ]
    assert between
    if num == 1:
        for num_tokens, shadow in between:
            assert shadow.baseline_seconds == num_tokens * (PROPOSER + EXPERT)
    assert all(sequence.stats.strategies["standard"] > 0 for sequence in sequences)


def test_the_measured_speedup_is_that_of_two_runs() -> None:
    """Of one text, by the same clock: all of it by standard, and all of it by cos."""
    decoding = make_decoding("cos", CONTRASTIVE, 2)
    taken = {}
    for strategy in ("standard", "cos"):
        alone: list[StepStats] = []
        run(
            timed_engine(alone, every_seconds=None),
            texts(make_decoding(strategy, CONTRASTIVE, 2), 1, max_tokens=1000),
        )
        taken[strategy] = sum(step.decode_seconds for step in alone)
    steps: list[StepStats] = []
    run(timed_engine(steps), texts(decoding, 1, max_tokens=1000))
    shadows = [step.shadow for step in steps if step.shadow is not None]
    baseline = sum(shadow.baseline_seconds for shadow in shadows)
    measured = baseline / sum(shadow.decode_seconds for shadow in shadows)
    assert measured == pytest.approx(taken["standard"] / taken["cos"], rel=0.15)


def test_a_mixture_keeps_windows_shut() -> None:
    steps: list[StepStats] = []
    engine = timed_engine(steps)
    coins = make_decoding("mixture", WEIGHTED, 3, 1)
    mixed = Sequence.start("coins", PROMPT, SamplingParams(max_tokens=60, seed=3), coins)
    run(engine, [mixed, *texts(make_decoding("cos", WEIGHTED), 1, max_tokens=20)])
    assert all(step.shadow is not None and step.shadow.outcome is None for step in steps)
    assert set(mixed.stats.strategies) == {"mixture"}


def test_a_window_that_cannot_measure_is_given_up() -> None:
    """Two sets of models at once: nobody can say whose seconds they are."""
    steps: list[StepStats] = []
    engine = timed_engine(steps, every_seconds=1.0)
    alone = make_decoding("single", Combination.only(2, 0))
    single = Sequence.start("only", PROMPT, SamplingParams(max_tokens=60, seed=3), alone)
    run(engine, [single, *texts(make_decoding("cos", WEIGHTED), 1, max_tokens=60)])
    outcomes = {step.shadow.outcome for step in steps if step.shadow is not None}
    assert "abandoned" in outcomes
    assert set(single.stats.strategies) == {"single"}


def test_windows_show_the_cost_table_forwards_of_one_token() -> None:
    """Under cos the expert scores several tokens at once, and what one takes would be a guess."""
    wrong = Timings(
        (1,), ((PROPOSER,), (EXPERT * 1.5,)), (0.0,), (0.0,), 2, ({}, {(1, 1): 1.5, (1, 3): 1.6})
    )
    errors = []
    for every_seconds in (None, 2.0):
        engine = timed_engine([], every_seconds=every_seconds)
        engine.observer.costs = costs = CostTable(wrong)
        run(engine, texts(make_decoding("speculative", CONTRASTIVE, 2), 1, max_tokens=200))
        more = costs.forward_seconds(1, 1, 3) / costs.forward_seconds(1, 1, 1)
        errors.append(abs(more / (1 + 2 * MORE / EXPERT) - 1))
    assert errors[1] < 0.5 * errors[0]


def test_windows_are_no_choices_of_auto() -> None:
    steps: list[StepStats] = []
    engine = timed_engine(steps)
    run(engine, texts(make_decoding("auto", CONTRASTIVE), 2))
    assert any(step.shadow is not None and step.shadow.outcome for step in steps)
    assert sum(len(step.chosen) for step in steps) == 0


def test_the_controller_goes_on_beside_it() -> None:
    steps: list[StepStats] = []
    engine = timed_engine(steps)
    engine.control(make_costs((PROPOSER, 0, 0), (EXPERT, 0, 0)))
    sequences = texts(auto(CONTRASTIVE), 2, max_tokens=60)
    run(engine, sequences)
    assert any(step.shadow is not None and step.shadow.outcome for step in steps)
    assert all(len(sequence.stats.strategies) > 1 for sequence in sequences)


def test_the_controller_learns_nothing_from_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was chosen did not take those seconds."""
    engine = timed_engine([])
    engine.control(make_costs((PROPOSER, 0, 0), (EXPERT, 0, 0)))
    states: dict[str, list[bool]] = {"seen": [], "all": []}
    observe, observed = Controller.observe, engine.observer.on_step

    def note(self: Controller, stats: StepStats, *arguments: Any) -> None:
        states["seen"].append(engine._strategies.is_shadowing)
        observe(self, stats, *arguments)

    def count(stats: StepStats) -> None:
        states["all"].append(engine._strategies.is_shadowing)
        assert observed is not None
        observed(stats)

    monkeypatch.setattr(Controller, "observe", note)
    engine.observer.on_step = count
    run(engine, texts(auto(CONTRASTIVE), 2, max_tokens=60))
    assert any(states["all"])
    assert states["seen"]
    assert not any(states["seen"])


def test_who_ends_in_a_step_decoded_in_it_too() -> None:
    """What a round takes is not known where its last tokens needed other models."""
    alone = make_decoding("standard", Combination.only(2, 1))
    both = make_decoding("standard", Combination.weighted([0.5, 0.5]))
    (sequence,) = texts(both, 1)
    for ended, key in ((both, ((0, 1), 2)), (alone, None)):
        stats = StepStats(1, deliveries=[Delivery(ended, 1, has_first=False)])
        assert shadow._key(stats, [sequence], 2) == key


def test_off_is_off() -> None:
    assert EngineConfig().shadow is None
    steps: list[StepStats] = []
    sequences = texts(make_decoding("cos", CONTRASTIVE), 2)
    run(timed_engine(steps, every_seconds=None), sequences)
    assert all(step.shadow is None for step in steps)
    assert {strategy for s in sequences for strategy in s.stats.strategies} == {"cos"}

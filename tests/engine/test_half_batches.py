"""Half of the sequences in flight while the rest go on: the same texts, and what overlaps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence as Row
from dataclasses import replace
from typing import Any

import pytest

from server.core.combination import Combination
from server.core.sampling_params import LookupParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import Fault, StepStats
from server.decoding.strategies import SharedCoins, Strategies
from server.engine.advance import Advancer
from server.engine.cost_table import CostTable
from server.engine.engine import Engine
from server.engine.half_batches import HalfBatches
from server.engine.limits import EngineLimits
from server.engine.outcome import Flight, Outcome
from server.engine.predictor import Predictor
from server.engine.rates import Rates
from server.engine.scheduler import Scheduler, StepPlan
from tests.engine.test_controller import make_costs
from tests.engine.test_run_ahead import DECODINGS, WEIGHTED, texts
from tests.support.engines import generated, make_decoding, make_engine, run
from tests.support.exact import Z_LIMIT, chi_square_z, exact_law
from tests.support.table_lm import DigitDecoder, TableLM, TableRunner

COS, STANDARD = DECODINGS["cos"], DECODINGS["standard"]
OWN = {name: decoding for name, decoding in DECODINGS.items() if not decoding.shared_coins} | {
    "lookup": replace(COS, lookup=LookupParams(3, 1, 4)),
    "auto": replace(make_decoding("auto", WEIGHTED), is_gamma_auto=True),
}


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_texts_are_those_of_undivided_batches(name: str, runs_ahead: bool) -> None:
    """Whatever requests ask for, and with a batch that is preempted and read in chunks."""
    for limits in ({}, {"num_pages": 24, "max_step_tokens": 11}):
        undivided: list[StepStats] = []
        divided: list[StepStats] = []
        made = texts(OWN[name], runs_ahead, divided, half_batches=True, **limits)
        assert made == texts(OWN[name], runs_ahead, undivided, **limits)
        assert sum(step.overlaps for step in divided) > 5
        assert not any(step.overlaps for step in undivided)
        assert bool(limits) == any(step.num_preempted for step in divided)


def test_law() -> None:
    """Of each sequence of a batch, though they share coins."""
    decoding = make_decoding("mixture", WEIGHTED, 4, 1, shared_coins=True)
    lms = [TableLM(seed=11 + k) for k in range(2)]
    params = [SamplingParams(max_tokens=3, seed=seed) for seed in range(2000)]
    sequences = [Sequence.start(f"s{p.seed}", [0, 2, 1], p, decoding) for p in params]
    samples = []
    for first in range(0, len(sequences), 4):
        engine = make_engine(lms, half_batches=True, coin_seed=first)
        deltas = run(engine, sequences[first : first + 4])
        samples += [generated(deltas[s.id]) for s in sequences[first : first + 4]]
    law = exact_law(lms, decoding.combination, params[0], [0, 2, 1])
    assert chi_square_z(samples, law) < Z_LIMIT


class Journal:
    """What an engine launches and lands, as (what, model, names of sequences)."""

    def __init__(self, engine: Engine) -> None:
        self.entries: list[tuple[str, int, frozenset[str]]] = []
        advancer = engine._advancer
        launch, land = advancer.launch, advancer.land

        def launched(plan: StepPlan) -> Flight:
            self._note("launch", plan)
            return launch(plan)

        def landed(flight: Flight) -> Outcome:
            self._note("land", flight.plan)
            return land(flight)

        advancer.launch, advancer.land = launched, landed  # type: ignore[method-assign]

    def _note(self, what: str, plan: StepPlan) -> None:
        self.entries.append((what, plan.model, frozenset(s.id for s in plan.sequences)))


def start(count: int, max_tokens: int = 40, **asked: Any) -> list[Sequence]:
    params = [SamplingParams(max_tokens=max_tokens, seed=i, **asked) for i in range(count)]
    return [Sequence.start(f"s{i}", [i % 9], p, COS) for i, p in enumerate(params)]


def test_while_one_half_is_scored_the_other_is_drafted() -> None:
    decoding = make_decoding("speculative", Combination.weighted([0.0, 1.0]), (3, 0))
    lms = [TableLM(70 + k, vocab_size=20) for k in range(2)]
    engine = make_engine(lms, half_batches=True)
    journal = Journal(engine)
    sequences = [replace(s, decoding=decoding, schedule=decoding) for s in start(4)]
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(30):
        engine.step()
    # Settled: both halves draft three tokens, then one model's scoring spans the other's drafting.
    flights = [i for i, entry in enumerate(journal.entries) if entry[:2] == ("launch", 1)][3:-2]
    assert len(flights) > 2
    for launched in flights:
        _, _, half = journal.entries[launched]
        assert len(half) == 2
        landed = journal.entries.index(("land", 1, half), launched)
        between = journal.entries[launched + 1 : landed]
        others = frozenset(s.id for s in sequences) - half
        # First what was in flight before it lands, then the others draft, then they are launched.
        drafted = [("launch", 0, others), ("land", 0, others)] * 3
        assert between == [("land", 1, others), *drafted, ("launch", 1, others)]


def test_aborting_what_is_in_flight_costs_nobody_else_anything() -> None:
    lms = [TableLM(70 + k, vocab_size=20) for k in range(2)]
    expected = run(make_engine(lms), start(16, 12))
    for seed in range(4):
        rng = random.Random(seed)
        engine = make_engine(lms, half_batches=True, num_pages=40)
        sequences = start(16, 12)
        for sequence in sequences:
            engine.add(sequence)
        made: dict[str, list[Any]] = {sequence.id: [] for sequence in sequences}
        aborted = set()
        while engine.has_work:
            for delta in engine.step():
                made[delta.sequence_id].append(delta)
            if rng.random() < 0.3:
                name = rng.choice(sequences).id
                engine.abort(name)
                aborted.add(name)
            engine.scheduler.check_integrity()
            assert all(delta.sequence_id not in aborted for delta in engine._undelivered)
        assert engine.scheduler.pages.num_used() == (0, 0)
        assert not engine.observer.is_ahead
        for name, deltas in made.items():
            assert generated(deltas) == generated(expected[name])[: len(generated(deltas))]
            if name not in aborted:
                assert deltas[-1].finish_reason == "length"


def test_who_is_in_flight_is_not_preempted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs its pages waits until it has landed."""
    preempt, fill = Scheduler._preempt, Scheduler._fill
    num_waits = 0

    def watched(scheduler: Scheduler, sequence: Sequence) -> None:
        assert sequence not in scheduler._in_flight
        preempt(scheduler, sequence)

    def counted(scheduler: Scheduler, *args: Any) -> StepPlan:
        nonlocal num_waits
        num_waits += 1
        plan = fill(scheduler, *args)
        num_waits -= 1
        return plan

    monkeypatch.setattr(Scheduler, "_preempt", watched)
    monkeypatch.setattr(Scheduler, "_fill", counted)
    steps: list[StepStats] = []
    made = texts(STANDARD, True, steps, half_batches=True, num_pages=20)
    assert made == texts(STANDARD, True, [])
    assert num_waits > 0
    assert sum(step.num_preempted for step in steps) > 0


class Scarce(TableRunner):
    """A forward over more than so many tokens does not fit into memory, now and then."""

    most: int

    def forward(self, batch: Any) -> Any:
        if self.num_forwards % 7 == 6 and batch.num_tokens > self.most:
            self.num_forwards += 1
            raise MemoryError
        return super().forward(batch)


@pytest.mark.parametrize(("scarce", "most"), [(0, 3), (1, 5)])
def test_a_forward_that_does_not_fit_leaves_what_is_in_flight_alone(scarce: int, most: int) -> None:
    """`most` is enough for one sequence."""
    lms = [TableLM(70 + k, vocab_size=20) for k in range(2)]
    expected = run(make_engine(lms), start(8, 24, is_seeded=True))
    runners = [TableRunner(lm) for lm in lms]
    runners[scarce] = scarcer = Scarce(lms[scarce])
    scarcer.most = most
    faults: list[Fault] = []
    engine = Engine(runners, DigitDecoder(), frozenset(), EngineLimits(half_batches=True))
    engine.on_fault = faults.append
    made = run(engine, start(8, 24, is_seeded=True), engine.scheduler.check_integrity)
    assert {name: generated(deltas) for name, deltas in made.items()} == {
        name: generated(deltas) for name, deltas in expected.items()
    }
    assert set(faults) == {"memory_pressure"}


@pytest.mark.parametrize("num_sequences", [2, 3])
def test_a_forward_that_fits_only_with_nothing_in_flight_is_done_then(num_sequences: int) -> None:
    class Beside(TableRunner):
        engine: Engine | None = None

        def forward(self, batch: Any) -> Any:
            if self.engine is not None and self.engine._in_flight:
                raise MemoryError
            return super().forward(batch)

    lms = [TableLM(70 + k, vocab_size=20) for k in range(2)]
    runners = [Beside(lm) for lm in lms]
    engine = Engine(runners, DigitDecoder(), frozenset(), EngineLimits(half_batches=True))
    for runner in runners:
        runner.engine = engine
    made = run(engine, start(num_sequences, 24), engine.scheduler.check_integrity)
    assert {deltas[-1].finish_reason for deltas in made.values()} == {"length"}


class Once(TableRunner):
    """One forward over several sequences runs out of memory; which one is said by the test."""

    is_due = has_failed = False

    def forward(self, batch: Any) -> Any:
        if Once.is_due and len(batch.spans) > 1:
            Once.is_due, Once.has_failed = False, True
            raise MemoryError
        return super().forward(batch)


@pytest.mark.parametrize("name", ["cos", "standard"])
def test_running_out_twice_leaves_nothing_half_undone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward, and then what is in flight, when it is decided while that is undone."""
    lms = [TableLM(70 + k, vocab_size=20) for k in range(2)]
    expected = run(make_engine(lms), start(8, 24, is_seeded=True))
    decide = Advancer._decide_together

    def failing(advancer: Advancer, flight: Flight, sequences: Row[Sequence]) -> None:
        if Once.has_failed and len(sequences) > 1:
            Once.has_failed = False
            raise MemoryError
        decide(advancer, flight, sequences)

    monkeypatch.setattr(Advancer, "_decide_together", failing)
    for when in range(6, 40, 3):
        limits = EngineLimits(half_batches=True)
        engine = Engine([Once(lm) for lm in lms], DigitDecoder(), frozenset(), limits)
        steps = iter(range(1000))

        def due_then(
            when: int = when, steps: Iterator[int] = steps, engine: Engine = engine
        ) -> None:
            engine.scheduler.check_integrity()
            Once.is_due |= next(steps) == when

        sequences = [
            replace(s, decoding=DECODINGS[name], schedule=DECODINGS[name])
            for s in start(8, 24, is_seeded=True)
        ]
        made = run(engine, sequences, due_then)
        assert not Once.is_due
        assert not Once.has_failed
        assert {key: generated(deltas) for key, deltas in made.items()} == {
            key: generated(deltas) for key, deltas in expected.items()
        }


def test_who_calls_no_other_model_keeps_nobody_in_flight() -> None:
    """Beside one that writes a long text by the first model alone."""
    lms = [TableLM(70 + k, vocab_size=20) for k in range(2)]
    alone = make_decoding("single", Combination.only(2, 0))
    for half_batches in (False, True):
        runners = [TableRunner(lm, max_length=512) for lm in lms]
        limits = EngineLimits(half_batches=half_batches)
        engine = Engine(runners, DigitDecoder(), frozenset(), limits)
        long = Sequence.start("long", [1], SamplingParams(max_tokens=400, seed=9), alone)
        for sequence in (*start(4, 10), long):
            engine.add(sequence)
        while len(engine.scheduler.running) + len(engine.scheduler.waiting) > 1:
            engine.step()
        assert long.num_generated < 100


def test_running_out_while_deciding_preempts_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lms = [TableLM(70 + k, vocab_size=20) for k in range(2)]
    expected = run(make_engine(lms), start(8, 24, is_seeded=True))
    steps: list[StepStats] = []
    engine = make_engine(lms, half_batches=True, on_step=steps.append)
    faults: list[Fault] = []
    engine.on_fault = faults.append
    decide, calls = engine._advancer._decide_together, iter(range(10**6))

    def failing(flight: Flight, sequences: Row[Sequence]) -> None:
        if len(sequences) > 1 and next(calls) % 9 == 8:
            raise MemoryError
        decide(flight, sequences)

    monkeypatch.setattr(engine._advancer, "_decide_together", failing)
    made = run(engine, start(8, 24, is_seeded=True), engine.scheduler.check_integrity)
    assert {name: generated(deltas) for name, deltas in made.items()} == {
        name: generated(deltas) for name, deltas in expected.items()
    }
    assert set(faults) == {"memory_pressure"}
    assert not any(step.num_preempted for step in steps)


def test_texts_that_arrive_are_read_while_others_are_in_flight() -> None:
    lms = [TableLM(70 + k, vocab_size=20) for k in range(2)]

    def longer() -> list[Sequence]:
        params = [SamplingParams(max_tokens=9, seed=i) for i in range(12)]
        return [Sequence.start(f"s{i}", [i] * (1 + 3 * i), p, COS) for i, p in enumerate(params)]

    expected = run(make_engine(lms), longer())
    engine = make_engine(lms, half_batches=True, max_step_tokens=11, max_prefill_tokens=8)
    waiting = longer()
    made: dict[str, list[Any]] = {sequence.id: [] for sequence in waiting}
    while engine.has_work or waiting:
        if waiting:
            engine.add(waiting.pop(0))
        for delta in engine.step() + engine.step():
            made[delta.sequence_id].append(delta)
    assert {name: generated(deltas) for name, deltas in made.items()} == {
        name: generated(deltas) for name, deltas in expected.items()
    }


def test_short_prompts_do_not_wait_for_halves() -> None:
    """Steps that read them land at once."""
    lms = [TableLM(70 + k, vocab_size=20) for k in range(2)]
    engine = make_engine(lms, half_batches=True)
    for sequence in start(2):
        engine.add(sequence)
    while engine.scheduler.num_decoding < 2:
        engine.step()
    params = SamplingParams(max_tokens=20, prefix_cache=False)
    prompts = [Sequence.start(f"p{i}", [3] * 8, params, COS) for i in range(30)]
    for sequence in prompts:
        engine.add(sequence)
    for _ in range(6):
        engine.step()
    assert all(sequence.num_generated for sequence in prompts)


def test_alone_nothing_is_divided() -> None:
    steps: list[StepStats] = []
    lms = [TableLM(70 + k, vocab_size=20) for k in range(2)]
    run(make_engine(lms, half_batches=True, on_step=steps.append), start(1))
    assert not any(step.overlaps for step in steps)


# Two models on two devices, by seconds: of a forward, of each row more, of deciding a row.
BY_ROWS = make_costs((0.0, 0.0, 1.0), (0.0, 0.0, 4.0))
BY_FORWARDS = make_costs((1.0, 0.0, 0.0), (4.0, 0.0, 0.0))
UNEQUAL = make_costs((0.0, 0.0, 1.0), (0.0, 0.0, 100.0))


@pytest.mark.parametrize(
    ("costs", "strategy", "gain"),
    [
        # The larger model is always busy: all of the smaller one's time is gained.
        (BY_ROWS, "standard", 5 / 4),
        (UNEQUAL, "standard", 101 / 100),
        # Both halves take as long as the whole.
        (BY_FORWARDS, "standard", 5 / 8),
        (BY_ROWS, "mixture", 0.0),
    ],
)
def test_what_half_batches_gain(costs: CostTable, strategy: str, gain: float) -> None:
    predictor = Predictor(costs, Strategies(SharedCoins(0)))
    decoding = make_decoding(strategy, WEIGHTED, shared_coins=strategy == "mixture")
    whole = predictor.token_seconds(decoding, Rates((0.8, 0.8)), 16)
    assert whole / predictor.halved_seconds(
        decoding, Rates((0.8, 0.8)), 16, (0, 1)
    ) == pytest.approx(gain)
    # On one device there is nothing to gain.
    assert whole <= predictor.halved_seconds(decoding, Rates((0.8, 0.8)), 16, (0, 0)) * (1 + 1e-9)


def test_no_half_is_done_before_all_has_been_done_for_it() -> None:
    """Three devices for two halves: none of them is always busy."""
    predictor = Predictor(make_costs(*[(0.0, 0.0, 1.0)] * 3), Strategies(SharedCoins(0)))
    decoding = make_decoding("standard", Combination.weighted([0.3, 0.3, 0.4]))
    rates = Rates((0.8,) * 3)
    halved = predictor.halved_seconds(decoding, rates, 16, (0, 1, 2))
    assert predictor.token_seconds(decoding, rates, 16) / halved == pytest.approx(2)


@pytest.mark.parametrize("costs", [BY_ROWS, BY_FORWARDS])
def test_they_are_on_where_they_pay(costs: CostTable) -> None:
    predictor = Predictor(costs, Strategies(SharedCoins(0)))
    for decoding in (STANDARD, COS):
        halves = HalfBatches(predictor, (0, 1), wanted=None)
        halves.look(decoding, Rates((0.8, 0.8)), 16)
        assert halves.is_on == (costs is BY_ROWS)
        halves.look(decoding, Rates((0.8, 0.8)), 1)
        assert not halves.is_on
    assert not HalfBatches(predictor, (0, 0), wanted=None).is_open
    for wanted in (True, False):
        asked = HalfBatches(predictor, (0, 1), wanted)
        assert asked.is_on == wanted
        assert not asked.is_open


def test_what_is_on_stays_on_for_less_than_switched_it_on() -> None:
    """Else noise would switch it to and fro."""
    gains = {row: make_costs((0.0, 0.0, 1.0), (0.0, 0.0, row)) for row in (4.0, 20.0, 100.0)}
    halves = [
        HalfBatches(Predictor(costs, Strategies(SharedCoins(0))), (0, 1), None)
        for costs in gains.values()
    ]
    for each in halves:
        each.is_on = True
        each.look(STANDARD, Rates((0.8, 0.8)), 16)
    assert [each.is_on for each in halves] == [True, True, False]
    for each in halves:
        each.is_on = False
        each.look(STANDARD, Rates((0.8, 0.8)), 16)
    assert [each.is_on for each in halves] == [True, False, False]

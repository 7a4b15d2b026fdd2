"""Errors thrown into each stage of the engine: what each sequence gets, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from server.cache.page_table import PageTable
from server.cache.prefix_keys import PrefixKeys
from server.cache.score_store import ScoreStore
from server.core.combination import Combination
from server.core.output import TokenDelta
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.decoding.strategies import Strategies
from server.decoding.warp import Place
from server.engine import scheduler
from server.engine.decider import Decider
from server.engine.detokenizer import TextStream
from server.engine.drafted_ids import DraftedIds
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.engine.scheduler import StepPlan
from server.runner.base import Batch
from tests.support.engines import generated, make_decoding, run
from tests.support.table_lm import DigitDecoder, TableLM, TableRunner

VOCAB = 20
STRATEGIES = ("standard", "speculative", "cos", "mixture")
BAD = 3  # the sequence that something happens to; its prompt holds this token only


class FaultyRunner(TableRunner):
    """Fails on purpose: `fail(batch)` may raise, `poison` makes NaN of one prompt's scores."""

    fail: Callable[[Batch], None] | None = None
    poison = False

    def forward(self, batch: Batch) -> Tensor:
        if self.fail is not None:
            self.fail(batch)
        scores = super().forward(batch)
        if self.poison:
            row = 0
            for span in batch.spans:
                is_bad = self._pages[span.pages[0], 0] == BAD
                if is_bad:
                    scores[row : row + span.num_kept] = torch.nan
                row += span.num_kept
        return scores


def make_engine(num_pages: int = 4096, **limits: Any) -> tuple[Engine, list[FaultyRunner]]:
    runners = [FaultyRunner(TableLM(k, VOCAB), f"m{k}", num_pages=num_pages) for k in range(2)]
    return Engine(runners, DigitDecoder(), frozenset(), EngineLimits(**limits)), runners


def make_sequences(strategy: str = "cos", max_tokens: int = 12, **params: Any) -> list[Sequence]:
    decoding = make_decoding(strategy, Combination.weighted([0.5, 0.5]), gamma=3)
    return [
        Sequence.start(
            f"s{i}", [i, i], SamplingParams(max_tokens=max_tokens, seed=i, **params), decoding
        )
        for i in range(6)
    ]


def clean_run(strategy: str = "cos", **params: Any) -> dict[str, list[TokenDelta]]:
    return run(make_engine()[0], make_sequences(strategy, **params))


def check_only_the_bad_one_failed(
    deltas: dict[str, list[TokenDelta]], strategy: str, reason: str, **params: Any
) -> None:
    expected = clean_run(strategy, **params)
    for name, each in deltas.items():
        if name == f"s{BAD}":
            assert each[-1].finish_reason == "error"
            assert reason in (each[-1].error or "")
            continue
        assert generated(each) == generated(expected[name]), name
        assert "".join(d.text for d in each) == "".join(d.text for d in expected[name])
        assert [d.logprobs for d in each] == [d.logprobs for d in expected[name]]
        assert each[-1].finish_reason == "length"


def check_clean(engine: Engine) -> None:
    engine.scheduler.check_integrity()
    assert not engine.has_work
    assert engine.scheduler.pages.num_used() == (0, 0)


def record_faults(engine: Engine) -> list[str]:
    faults: list[str] = []
    engine.on_fault = faults.append
    return faults


@pytest.mark.parametrize(
    ("strategy", "temperature"),
    [*((strategy, 1.0) for strategy in STRATEGIES), ("standard", 0.0), ("cos", 0.0)],
)
def test_nan_scores_end_one_sequence(strategy: str, temperature: float) -> None:
    engine, runners = make_engine()
    faults = record_faults(engine)
    runners[1].poison = True
    deltas = run(engine, make_sequences(strategy, temperature=temperature))
    check_only_the_bad_one_failed(deltas, strategy, "returned NaN", temperature=temperature)
    check_clean(engine)
    assert faults == ["invalid_scores"]


def fail_deciding(
    monkeypatch: pytest.MonkeyPatch, error: Exception, fails: Callable[[list[Place]], bool]
) -> None:
    """Raise `error` wherever tokens of such places are decided."""

    def wrap(method: str, argument: int) -> None:
        original = getattr(Decider, method)

        def raising(self: Decider, *arguments: Any, **named: Any) -> Tensor:
            if fails(arguments[argument]):
                raise error
            decided: Tensor = original(self, *arguments, **named)
            return decided

        monkeypatch.setattr(Decider, method, raising)

    wrap("draw", 0)
    wrap("verify", 0)
    wrap("propose", 1)


@pytest.mark.parametrize("cpu_kernels", ["auto", "off"])
@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("strategy", STRATEGIES[:3])
def test_an_error_while_deciding_ends_one_sequence(
    monkeypatch: pytest.MonkeyPatch, strategy: str, logprobs: int | None, cpu_kernels: str
) -> None:
    """Raised for every batch that the sequence is in, as by its grammar or its bias."""

    def is_bad(places: list[Place]) -> bool:
        return any(s.id == f"s{BAD}" and position > 6 for s, position in places)

    fail_deciding(monkeypatch, ValueError("told to fail"), is_bad)
    engine, _ = make_engine(cpu_kernels=cpu_kernels)
    faults = record_faults(engine)
    deltas = run(engine, make_sequences(strategy, logprobs=logprobs))
    monkeypatch.undo()
    check_only_the_bad_one_failed(deltas, strategy, "internal error", logprobs=logprobs)
    check_clean(engine)
    assert faults == ["internal"]


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_an_error_in_the_detokeniser_ends_one_sequence(
    monkeypatch: pytest.MonkeyPatch, runs_ahead: bool
) -> None:
    original = TextStream.push

    def raising(self: TextStream, token_ids: list[int]) -> Any:
        if self._ids[0] == BAD and len(self._ids) > 6:
            raise ValueError("told to fail")
        return original(self, token_ids)

    monkeypatch.setattr(TextStream, "push", raising)
    engine, _ = make_engine(runs_ahead=runs_ahead)
    faults = record_faults(engine)
    deltas = run(engine, make_sequences())
    monkeypatch.undo()
    check_only_the_bad_one_failed(deltas, "cos", "internal error")
    check_clean(engine)
    assert faults == ["internal"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_forwards_that_do_not_fit_are_made_smaller(strategy: str, error: Exception) -> None:
    """No forward of more than 2 spans or 6 tokens ever fits; every text is what it would be."""
    engine, runners = make_engine(max_step_tokens=64, max_gamma=3)
    faults = record_faults(engine)
    steps: list[StepStats] = []
    engine.observer.on_step = steps.append

    def fail(batch: Batch) -> None:
        if len(batch.spans) > 2 or batch.num_tokens > 6:
            raise error

    for runner in runners:
        runner.fail = fail
    sequences = make_sequences(strategy)
    deltas = run(engine, sequences)
    expected = clean_run(strategy)
    assert {name: generated(each) for name, each in deltas.items()} == {
        name: generated(each) for name, each in expected.items()
    }
    check_clean(engine)
    assert set(faults) == {"memory_pressure"}
    # Counters know of each forward once.
    for model in range(len(runners)):
        forwards = sum(sequence.stats.forwards[model] for sequence in sequences)
        assert forwards == sum(step.num_decoding for step in steps if step.model == model)
    # It would give nothing back: pages are allocated already.
    assert not any(sequence.stats.num_preemptions for sequence in sequences)


def test_steps_stay_as_large_as_what_is_never_split() -> None:
    """However often prompts did not fit: a whole proposal is scored at once."""
    engine, _ = make_engine(max_step_tokens=64, max_gamma=3)
    (sequence, *_) = make_sequences()
    for count in (64, 24, 12, 6):
        assert engine.scheduler.shrink(StepPlan(0, (sequence,), (count,), ()))
    assert engine.scheduler._token_limit == 3 + 2
    assert not engine.scheduler.shrink(StepPlan(0, (sequence,), (5,), ()))


def test_prompts_that_do_not_fit_take_nobody_out_of_the_batch() -> None:
    """Their tokens were too many: smaller pieces follow, and who decodes goes on."""
    engine, runners = make_engine(max_step_tokens=128, max_prefill_tokens=64)
    decoding = make_decoding("standard", Combination.weighted([0.5, 0.5]))
    params = SamplingParams(max_tokens=40, seed=1)
    for i in range(12):
        engine.add(Sequence.start(f"s{i}", [i], params, decoding))
    for _ in range(4):
        engine.step()
    failures = [MemoryError()]

    def fail(batch: Batch) -> None:
        if batch.num_tokens > 50 and failures:
            raise failures.pop()

    runners[0].fail = fail
    widths: list[int] = []
    engine.observer.on_step = lambda stats: widths.append(stats.num_decoding)
    for i in range(2):
        engine.add(Sequence.start(f"long{i}", [i] * 24, params, decoding))
    for _ in range(8):
        engine.step()
        engine.scheduler.check_integrity()
    assert not failures
    assert len(engine.scheduler.running) == 14
    assert min(widths) >= 12


def test_a_victim_that_cannot_be_preempted_is_the_one_that_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its error is not that of who needed its pages."""
    original = DraftedIds.read_tail

    def raising(self: DraftedIds, sequence: Sequence) -> None:
        if sequence.id == f"s{BAD}":
            raise ValueError("told to fail")
        original(self, sequence)

    monkeypatch.setattr(DraftedIds, "read_tail", raising)
    engine, _ = make_engine(num_pages=1 + 2 * 4)
    faults = record_faults(engine)
    deltas = run(engine, make_sequences(), engine.scheduler.check_integrity)
    check_only_the_bad_one_failed(deltas, "cos", "internal error")
    check_clean(engine)
    assert faults == ["internal"]


def test_what_does_not_fit_alone_is_refused() -> None:
    engine, runners = make_engine()
    faults = record_faults(engine)

    def fail(batch: Batch) -> None:
        if any(runners[0]._pages[span.pages[0], 0] == BAD for span in batch.spans):
            raise MemoryError

    runners[1].fail = fail
    deltas = run(engine, make_sequences("standard"))
    check_only_the_bad_one_failed(deltas, "standard", "not enough memory")
    check_clean(engine)
    assert faults.count("out_of_memory") == 1


def test_memory_that_runs_out_while_deciding_costs_nobody_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = clean_run(logprobs=1)
    error = torch.OutOfMemoryError("told to fail")
    fail_deciding(monkeypatch, error, lambda places: len({s.id for s, _ in places}) > 2)
    engine, _ = make_engine()
    faults = record_faults(engine)
    deltas = run(engine, make_sequences(logprobs=1))
    for name, each in deltas.items():
        assert generated(each) == generated(expected[name])
        tokens = [entry.token_id for delta in each for entry in delta.logprobs]
        assert tuple(tokens) == generated(each)
    check_clean(engine)
    assert set(faults) == {"memory_pressure"}


def test_steps_grow_again_after_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_SMOOTH_STEPS", 8)
    engine, runners = make_engine(max_sequences=8)
    calls = [0]

    def fail(batch: Batch) -> None:
        calls[0] += 1
        if calls[0] in (3, 4) and len(batch.spans) > 1:
            raise MemoryError

    runners[0].fail = fail
    widths: list[int] = []
    engine.observer.on_step = lambda stats: widths.append(stats.num_sequences)
    deltas = run(engine, make_sequences("standard", max_tokens=60))
    assert all(each[-1].finish_reason == "length" for each in deltas.values())
    assert min(widths) <= 3
    assert max(widths[len(widths) // 2 :]) == 6
    check_clean(engine)


def test_steps_grow_after_some_that_went_well_and_not_beyond_what_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler, "_SMOOTH_STEPS", 2)
    engine, _ = make_engine(max_step_tokens=64, max_gamma=3)
    (sequence, *_) = make_sequences()
    for count in (48, 24):
        engine.scheduler.relax()
        assert engine.scheduler.shrink(StepPlan(0, (sequence,), (count,), ()))
    for limit in (12, 24, 24, 48, 48, 64, 64, 64):
        engine.scheduler.relax()
        assert engine.scheduler._token_limit == limit


def test_pages_that_run_out_preempt_and_lose_nothing() -> None:
    engine, _ = make_engine(num_pages=1 + 2 * 4)  # four sequences' worth at their longest
    deltas = run(engine, make_sequences(), engine.scheduler.check_integrity)
    expected = clean_run()
    assert {name: generated(each) for name, each in deltas.items()} == {
        name: generated(each) for name, each in expected.items()
    }
    assert sum(each[-1].stats.num_preemptions for each in deltas.values() if each[-1].stats) > 0
    check_clean(engine)


def test_a_forward_that_fails_for_no_known_reason_ends_the_engine() -> None:
    engine, runners = make_engine()

    def fail(batch: Batch) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    runners[1].fail = fail
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(engine, make_sequences())


@pytest.mark.parametrize("strategy", ["cos", "mixture"])
@pytest.mark.parametrize("num_pages", [4096, 1 + 2 * 4])
@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (scheduler.Scheduler, "_reserve"),
        (scheduler.Scheduler, "_start"),
        (scheduler.Scheduler, "_want"),
        (scheduler.Scheduler, "_take"),
        (Strategies, "settle"),
        (ScoreStore, "take_slot"),
    ],
)
def test_an_error_in_the_scheduler_ends_one_sequence(
    monkeypatch: pytest.MonkeyPatch, strategy: str, num_pages: int, owner: type, method: str
) -> None:
    """Before a stage of admission or planning of the sequence, and after it."""
    original = getattr(owner, method)
    engine, _ = make_engine(num_pages=num_pages, max_sequences=4)

    def is_bad(args: tuple[Any, ...]) -> bool:
        for arg in args:
            sequence = arg if isinstance(arg, Sequence) else getattr(arg, "sequence", None)
            if sequence is not None:
                return bool(sequence.id == f"s{BAD}")
        return bool(engine.scheduler.waiting[0].id == f"s{BAD}")  # a slot for the next one

    for is_late in (False, True):

        def raising(self: Any, *args: Any, is_late: bool = is_late) -> Any:
            will_fail = is_bad(args)
            result = original(self, *args) if is_late or not will_fail else None
            if will_fail and (method != "take_slot" or not is_late):
                raise ValueError("told to fail")
            return result

        monkeypatch.setattr(owner, method, raising)
        faults = record_faults(engine)
        deltas = run(engine, make_sequences(strategy), engine.scheduler.check_integrity)
        monkeypatch.undo()
        if method != "take_slot" or not is_late:
            check_only_the_bad_one_failed(deltas, strategy, "internal error")
            assert faults == ["internal"]
        check_clean(engine)


@pytest.mark.parametrize("stage", ["_reserve", "_want"])
def test_memory_that_runs_out_in_the_scheduler_ends_one_sequence(
    monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    original = getattr(scheduler.Scheduler, stage)

    def raising(self: scheduler.Scheduler, sequence: Sequence) -> Any:
        if sequence.id == f"s{BAD}":
            raise MemoryError
        return original(self, sequence)

    monkeypatch.setattr(scheduler.Scheduler, stage, raising)
    engine, _ = make_engine()
    faults = record_faults(engine)
    deltas = run(engine, make_sequences())
    monkeypatch.undo()
    check_only_the_bad_one_failed(deltas, "cos", "not enough memory")
    assert faults == ["out_of_memory"]
    check_clean(engine)


@pytest.mark.parametrize("stage", ["lookup", "adopt", "publish"])
def test_an_error_in_the_prefix_cache_ends_one_sequence(
    monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The bad one's prompt differs from the others' in its middle."""
    shared = [7] * 16

    def sequences() -> list[Sequence]:
        decoding = make_decoding("cos", Combination.weighted([0.5, 0.5]), gamma=3)
        params = SamplingParams(max_tokens=24, seed=1)
        prompts = [[*shared, i, *shared] for i in range(6)]
        return [
            Sequence.start(f"s{i}", prompt, params, decoding) for i, prompt in enumerate(prompts)
        ]

    expected = run(make_engine()[0], sequences())
    original: dict[str, Any] = {
        "lookup": (PrefixKeys, "key"),
        "adopt": (PageTable, "adopt"),
        "publish": (PageTable, "publish"),
    }
    owner, method = original[stage]
    unharmed = getattr(owner, method)

    def raising(self: Any, token_ids: list[int], *rest: Any) -> Any:
        result = unharmed(self, token_ids, *rest)
        if token_ids[16] == BAD:
            raise ValueError("told to fail")
        return result

    monkeypatch.setattr(owner, method, raising)
    engine, _ = make_engine()
    faults = record_faults(engine)
    deltas = run(engine, sequences(), engine.scheduler.check_integrity)
    monkeypatch.undo()
    assert faults == ["internal"]
    for name, each in deltas.items():
        if name == f"s{BAD}":
            assert each[-1].finish_reason == "error"
        else:
            assert generated(each) == generated(expected[name])
    check_clean(engine)


def test_an_abort_is_obeyed_before_the_next_step() -> None:
    engine, runners = make_engine()
    sequences = make_sequences(max_tokens=40)
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(7):
        engine.step()
    engine.abort("s2")
    engine.scheduler.check_integrity()
    assert {s.id for s in engine.scheduler.running} == {"s0", "s1", "s3", "s4", "s5"}
    before = [runner.num_forwards for runner in runners]
    assert all(delta.sequence_id != "s2" for delta in engine.step())
    assert sum(runner.num_forwards for runner in runners) == sum(before) + 1

"""The cost table and the estimated speedup, with forwards that take exactly what a test says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from server.core.combination import Combination
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.core.stats import Delivery, StepStats
from server.engine.calibration import calibrate
from server.engine.cost_table import CostTable, Ratio, Timings
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.runner.base import Batch
from tests.engine.test_controller import make_costs
from tests.support.engines import decode, make_decoding, run
from tests.support.table_lm import DigitDecoder, TableLM, TableRunner

BOTH = Combination.weighted((0.5, 0.5))


class Clock:
    """Stands still unless a runner moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class ClockedRunner(TableRunner):
    """Takes `base` seconds, `each` for every token, and `past` for each token before."""

    def __init__(
        self,
        clock: Clock,
        seed: int,
        base: float,
        each: float,
        num_pages: int = 4096,
        past: float = 0.0,
    ) -> None:
        super().__init__(TableLM(seed), num_pages=num_pages, max_length=1024)
        self._pages = np.zeros_like(self._pages)  # contexts that count as read
        self._clock, self._base, self._each = clock, base, each
        self._past = past
        self.load = 1.0

    def forward(self, batch: Batch) -> Tensor:
        before = sum(span.num_past for span in batch.spans)
        seconds = self._base + self._each * batch.num_tokens + self._past * before
        self._clock.now += seconds * self.load
        return super().forward(batch)


def make_engine(
    *seconds: tuple[float, float],
    num_pages: int = 4096,
    max_sequences: int = 8,
    past: tuple[float, ...] = (0.0, 0.0, 0.0),
) -> tuple[Engine, list[StepStats]]:
    clock = Clock()
    runners = [ClockedRunner(clock, k, *each, num_pages, past[k]) for k, each in enumerate(seconds)]
    steps: list[StepStats] = []
    limits = EngineLimits(max_sequences=max_sequences)
    decoder = DigitDecoder()
    engine = Engine(runners, decoder, frozenset(), limits, on_step=steps.append, clock=clock)
    return engine, steps


@pytest.mark.parametrize("half_batches", [None, True])
def test_a_table_of_forwards(half_batches: bool | None) -> None:
    """Of all sequences together, whatever is wanted later."""
    engine, steps = make_engine((0.01, 0.001), (0.1, 0.01))
    engine.half_batches = half_batches
    costs = calibrate(engine, BOTH)
    assert costs is not None
    assert costs.timings.batches == (1, 2, 4, 8)
    assert costs.timings.forward_seconds[0] == pytest.approx((0.011, 0.012, 0.014, 0.018))
    assert costs.timings.forward_seconds[1] == pytest.approx((0.11, 0.12, 0.14, 0.18))
    assert costs.timings.rest_seconds == pytest.approx((0, 0, 0, 0))
    for batch, tokens in ((1, 1), (1, 2), (3, 1), (4, 5), (2, 3), (8, 9), (16, 4)):
        assert costs.forward_seconds(1, batch, tokens) == pytest.approx(0.1 + 0.01 * batch * tokens)
    assert not steps, "calibration is no traffic"
    assert engine.half_batches is half_batches
    assert engine.scheduler.pages.num_used() == (0, 0)
    engine.scheduler.check_integrity()


def test_a_rehearsal_ends_with_an_error_as_without() -> None:
    engine, steps = make_engine((0.01, 0.001), (0.1, 0.01))
    engine.half_batches = True
    engine.add(Sequence.start("s", [0, 1], SamplingParams(), make_decoding("standard", BOTH)))
    rehearsed: list[StepStats] = []

    def rehearse() -> None:
        nonlocal rehearsed
        with engine.rehearsing() as rehearsed:
            assert engine.half_batches is False
            engine.step()
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        rehearse()
    assert (len(rehearsed), len(steps)) == (1, 0)
    engine.step()
    assert (len(rehearsed), len(steps)) == (1, 1)
    assert engine.half_batches is True


def test_models_that_the_combination_does_not_need_are_timed_too() -> None:
    engine, _ = make_engine((0.01, 0), (0.05, 0), (0.1, 0))
    costs = calibrate(engine, Combination.contrastive(3, 0.1))
    assert costs is not None
    timed = [seconds[0] for seconds in costs.timings.forward_seconds]
    assert timed == pytest.approx([0.01, 0.05, 0.1])


def test_memory_bounds_the_batch() -> None:
    engine, _ = make_engine((0.01, 0), (0.1, 0), num_pages=120)
    costs = calibrate(engine, BOTH)
    assert costs is not None
    assert costs.timings.batches == (1, 2)


def test_no_memory_is_no_estimate() -> None:
    engine, _ = make_engine((0.01, 0), (0.1, 0), num_pages=8)
    assert calibrate(engine, BOTH) is None


def test_a_context_too_short_for_a_round_is_no_estimate() -> None:
    engine, _ = make_engine((0.01, 0), (0.1, 0))
    for engine.max_length in (2, 6):
        assert calibrate(engine, BOTH) is None
    engine.max_length = 8
    assert calibrate(engine, BOTH) is not None


def test_slow_models_are_timed_at_few_batches() -> None:
    engine, _ = make_engine((0.2, 0), (1.0, 0))
    costs = calibrate(engine, BOTH)
    assert costs is not None
    assert costs.timings.batches == (1,)


@pytest.mark.parametrize(
    ("models", "past", "largest", "most_seconds"),
    [
        (((0.02, 0), (0.04, 0)), 0.0, 64, 5),
        (((0.002, 0.004), (0.004, 0.01)), 0.0, 32, 10),
        (((0.02, 0.02), (0.04, 0.04)), 0.0, 4, 10),
        (((0.002, 0), (0.004, 0)), 1e-4, 16, 9),
        (((0.01, 0), (0.03, 0)), 1e-3, 2, 14),
    ],
)
def test_it_takes_seconds(
    models: tuple[tuple[float, float], ...], past: float, largest: int, most_seconds: float
) -> None:
    """However long forwards take, and by whatever they take longer."""
    engine, _ = make_engine(*models, max_sequences=64, past=(past,) * 2)
    costs = calibrate(engine, BOTH)
    assert costs is not None
    assert costs.timings.batches[-1] == largest
    assert engine.clock() < most_seconds


def test_more_sequences_never_cost_less() -> None:
    """Noise that says so would be extrapolated below zero."""
    engine, _ = make_engine((0.01, -0.0004), (0.02, -0.0004))
    costs = calibrate(engine, BOTH)
    assert costs is not None
    assert costs.timings.forward_seconds[0] == pytest.approx((0.0096,) * 4)
    assert costs.forward_seconds(0, 64, 1) > 0


def test_where_texts_cannot_be_much_longer_they_are_not_timed() -> None:
    engine, _ = make_engine((0.01, 0), (0.03, 0), past=(1e-4, 1e-4))
    engine.max_length = 200
    costs = calibrate(engine, BOTH)
    assert costs is not None
    assert costs.timings.past_seconds == ()
    engine.max_length = 300
    costs = calibrate(engine, BOTH)
    assert costs is not None
    assert costs.timings.past_seconds[0] == pytest.approx((1e-4, 0.0))


def test_shorter_texts_than_those_timed_take_a_quarter_at_least() -> None:
    """What a token before adds was timed too, and may be a little too much."""
    timings = Timings((1,), ((0.1,),), (0.0,), (0.0,), context=128, past_seconds=((0.001, 0.0),))
    costs = CostTable(timings)
    for num_past, seconds in ((128, 0.1), (228, 0.2), (100, 0.072), (8, 0.025)):
        stats = StepStats(0, 1, 1, 1, num_past=num_past, num_attended=num_past)
        costs.observe(stats)
        assert costs.forward_seconds(0, 1, 1) == pytest.approx(seconds)


def test_between_and_beyond_what_was_timed() -> None:
    nothing = (0.0, 0.0, 0.0)
    forwards = ((1.0, 2.0, 6.0), (10.0, 10.0, 10.0))
    costs = CostTable(Timings((1, 2, 4), forwards, nothing, nothing))
    assert costs.standard((0,), 3).decoded == pytest.approx(4 / 3)
    assert costs.standard((0,), 5).decoded == pytest.approx(8 / 5)
    assert costs.standard((0, 1), 2).decoded == pytest.approx(12 / 2)


def test_the_first_token_of_a_text_is_not_decoding() -> None:
    costs = CostTable(Timings((1,), ((1.0,), (2.0,)), (0.2,), (0.3,)))
    decoding = make_decoding("cos", BOTH)
    deliveries = [Delivery(decoding, 3, has_first=True), Delivery(decoding, 1, has_first=False)]
    assert [costs.baseline(each, 1) for each in deliveries] == pytest.approx([2 * 3.5, 3.5])


def test_forced_tokens_cost_what_it_takes_to_read_them() -> None:
    """By standard decoding, beside what is decoded."""
    costs = make_costs((0.1, 0.01, 0.02), (0.2, 0.01, 0.03))
    delivery = Delivery(make_decoding("standard", BOTH), 7, has_first=False, num_forced=5)
    free = Delivery(make_decoding("standard", BOTH), 2, has_first=False)
    for batch in (1, 4):
        read = costs.baseline(delivery, batch) - costs.baseline(free, batch)
        assert read == pytest.approx(5 * (0.02 + 0.03))


def test_all_that_a_step_decides_has_its_price() -> None:
    costs = CostTable(Timings((1, 4), ((0.1, 0.1),), (0.0, 0.0), (0.01, 0.04)))

    def price(**decided: Any) -> float:
        return costs.price(StepStats(0, 4, 4, 4, **decided))

    assert price() == pytest.approx(0.1)
    assert price(num_drawn=4) == pytest.approx(0.1 + 0.04)
    assert price(tails=[3, 1]) == pytest.approx(0.1 + 0.04 * 1.5)
    assert price(num_proposed=4) == pytest.approx(0.1 + 0.04 * 0.7)


def test_prompts_are_charged_their_share_of_what_is_no_forward() -> None:
    costs = CostTable(Timings((1, 4), ((0.1, 0.1),), (0.0, 0.0), (0.0, 0.0)))
    stats = StepStats(0, num_sequences=4, num_decoding=1, num_tokens=31, num_prefill_tokens=30)
    stats.forward_seconds, stats.step_seconds = 0.5, 0.9
    assert costs.prefill_seconds(stats) == pytest.approx(0.5 - 0.1 + 0.4 * 3 / 4)


def test_prompts_are_charged_no_more_than_the_step_took() -> None:
    """Its share may be less than its forward, where steps overlap."""
    costs = CostTable(Timings((1, 4), ((0.1, 0.1),), (0.0, 0.0), (0.0, 0.0)))
    stats = StepStats(0, num_sequences=4, num_decoding=1, num_tokens=31, num_prefill_tokens=30)
    stats.forward_seconds, stats.step_seconds = 0.5, 0.2
    assert costs.prefill_seconds(stats) == 0.2


def test_steps_that_overlap_say_nothing_of_what_one_after_the_other_takes() -> None:
    costs = make_costs((0.1, 0, 0), (0.2, 0, 0))
    before = costs.standard((0, 1), 1).decoded
    for _ in range(100):
        costs.observe(StepStats(0, 1, 1, 1, forward_seconds=0.1, step_seconds=0.9, overlaps=True))
    assert costs.standard((0, 1), 1).decoded == pytest.approx(before)
    costs.observe(StepStats(0, 1, 1, 1, forward_seconds=0.1, step_seconds=0.2))
    assert costs.standard((0, 1), 1).decoded > 1.3 * before


def test_a_step_that_stalls_counts_for_four_at_most() -> None:
    found = []
    for stalled in (0.4, 40.0):
        ratio = Ratio(memory=1.0, prior=0.1)
        for seconds in (*[0.1] * 50, stalled):
            ratio.add(seconds, 0.1)
        found.append(ratio.value())
    assert found[0] == found[1] < 1.4
    ratio.add(0.4, 0.0)
    assert ratio.value() == found[1], "what was expected to take no time says nothing"


def test_prompts_beside_decoding_do_not_make_it_look_faster() -> None:
    engine, steps = make_engine((0.01, 0.001), (0.1, 0.01), max_sequences=8)
    engine.observer.costs = calibrate(engine, BOTH)
    decoding = make_decoding("standard", BOTH)
    for number in range(12):
        # One after the other, so that each but the first reads its prompt while others decode.
        params = SamplingParams(max_tokens=30, seed=number)
        engine.add(Sequence.start(f"s{number}", [number] * (20 + number), params, decoding))
        for _ in range(5):
            engine.step()
    while engine.has_work:
        engine.step()
    mixed = [step for step in steps if 0 < step.num_prefill_tokens < step.num_tokens]
    assert len(mixed) > 10
    for step in mixed:
        # A forward costs a base and so much for each token; prompts pay for theirs alone.
        each = (0.001, 0.01)[step.model]
        assert step.prefill_seconds == pytest.approx(each * step.num_prefill_tokens)
    took = sum(step.decode_seconds for step in steps)
    assert sum(step.baseline_seconds or 0 for step in steps) / took == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("num_sequences", [1, 3, 8])
def test_standard_decoding_is_as_fast_as_itself(num_sequences: int) -> None:
    engine, steps = make_engine((0.01, 0.001), (0.1, 0.01))
    engine.observer.costs = calibrate(engine, BOTH)
    params = [SamplingParams(max_tokens=20, seed=seed) for seed in range(num_sequences)]
    decode(engine, [0, 1, 2], params, make_decoding("standard", BOTH))
    decoding = [step for step in steps if step.num_prefill_tokens == 0]
    estimated = sum(step.baseline_seconds or 0.0 for step in steps)
    assert estimated == pytest.approx(sum(step.step_seconds for step in decoding))


@pytest.mark.parametrize("strategy", ["standard", "cos"])
def test_every_sequence_gets_its_share(strategy: str) -> None:
    engine, steps = make_engine((0.01, 0.001), (0.1, 0.01))
    engine.observer.costs = calibrate(engine, BOTH)
    sequences = [
        Sequence.start(str(seed), [0, 1], SamplingParams(max_tokens=9 + seed, seed=seed), decoding)
        for seed, decoding in enumerate([make_decoding(strategy, BOTH, gamma=3)] * 3)
    ]
    run(engine, sequences)
    stats = [sequence.stats for sequence in sequences]
    spent, estimated = (
        sum(each.decode_seconds for each in stats),
        sum(each.baseline_seconds or 0.0 for each in stats),
    )
    assert spent == pytest.approx(sum(step.decode_seconds for step in steps))
    assert estimated == pytest.approx(sum(step.baseline_seconds or 0.0 for step in steps))
    if strategy == "standard":
        assert estimated == pytest.approx(spent)
        assert [each.num_cycles for each in stats] == [9, 10, 11]
    else:
        assert all(0 < each.num_cycles < 11 for each in stats)


def test_scoring_many_for_the_price_of_one_is_faster() -> None:
    engine, steps = make_engine((0.001, 0), (0.1, 0))
    same = TableLM(7, spread=0.1)  # flat enough that most proposals are accepted
    for runner in engine.runners:
        runner._lm = same  # type: ignore[attr-defined]
    engine.observer.costs = calibrate(engine, BOTH)
    params = [SamplingParams(max_tokens=40, seed=seed) for seed in range(4)]
    decode(engine, [0, 1, 2], params, make_decoding("speculative", BOTH, gamma=4))
    decoding = [step for step in steps if step.num_prefill_tokens == 0]
    estimated = sum(step.baseline_seconds or 0.0 for step in steps)
    assert estimated / sum(step.step_seconds for step in decoding) > 2
    assert {step.phase for step in decoding} == {"propose", "score"}


def test_without_calibration_there_is_no_estimate() -> None:
    engine, steps = make_engine((0.01, 0), (0.1, 0))
    decode(engine, [0, 1], [SamplingParams(max_tokens=4)], make_decoding("cos", BOTH))
    assert steps
    assert all(step.baseline_seconds is None for step in steps)


@pytest.mark.parametrize("strategy", ["standard", "cos"])
def test_the_estimate_follows_the_load_of_the_machine(strategy: str) -> None:
    """Timed on a quiet machine, served on one that is 2.5 times slower."""
    engine, steps = make_engine((0.01, 0.001), (0.1, 0.01))
    engine.observer.costs = costs = calibrate(engine, BOTH)
    assert costs is not None
    for runner in engine.runners:
        runner.load = 2.5  # type: ignore[attr-defined]
    params = [SamplingParams(max_tokens=100, seed=seed) for seed in range(4)]
    decode(engine, [0, 1, 2], params, make_decoding(strategy, BOTH))
    assert costs.standard((0, 1), 4).decoded == pytest.approx(2.5 * (0.014 + 0.14) / 4, rel=0.05)
    assert [costs.load(model) for model in (0, 1)] == pytest.approx([2.5, 2.5], rel=0.05)
    late = [step for step in steps[len(steps) // 2 :] if step.num_prefill_tokens == 0]
    ratio = sum(step.baseline_seconds or 0.0 for step in late) / sum(s.step_seconds for s in late)
    if strategy == "standard":
        assert ratio == pytest.approx(1.0, abs=0.05)


def test_what_calibration_missed_is_learnt_for_its_shape_alone() -> None:
    engine, _ = make_engine((0.01, 0.001), (0.1, 0.01))
    costs = calibrate(engine, BOTH)
    assert costs is not None
    before = costs.forward_seconds(1, 8, 1)
    for _ in range(300):
        for batch, seconds in ((1, 0.11), (4, 0.14 * 1.2)):
            stats = StepStats(1, batch, batch, batch, forward_seconds=seconds)
            costs.observe(stats)
    assert costs.forward_seconds(1, 4, 1) == pytest.approx(0.14 * 1.2, rel=0.05)
    assert costs.forward_seconds(1, 1, 1) == pytest.approx(0.11, rel=0.05)
    assert costs.forward_seconds(1, 8, 1) == pytest.approx(before, rel=0.25)


def test_one_stall_moves_the_table_little() -> None:
    engine, _ = make_engine((0.01, 0.001), (0.1, 0.01))
    costs = calibrate(engine, BOTH)
    assert costs is not None
    for _ in range(50):
        costs.observe(StepStats(1, 1, 1, 1, forward_seconds=0.11))
    costs.observe(StepStats(1, 1, 1, 1, forward_seconds=11.0))
    assert costs.load(1) < 1.2


def test_nobody_finds_the_contexts_that_were_never_read() -> None:
    engine, _ = make_engine((0.01, 0.001), (0.1, 0.01))
    assert calibrate(engine, BOTH) is not None
    assert engine.scheduler.pages.num_used() == engine.scheduler.pages.num_idle() == (0, 0)
    engine.scheduler.check_integrity()


def stepped(
    model: int, tokens: int, past: int, seconds: float, batch: int = 4, shared: int = 0
) -> StepStats:
    return StepStats(
        model,
        num_sequences=batch,
        num_decoding=batch,
        num_past=past * batch,
        num_attended=past * batch - shared * (batch - 1),
        num_tokens=tokens * batch,
        forward_seconds=seconds,
        step_seconds=seconds,
    )


def test_longer_texts_are_not_taken_for_a_slower_machine() -> None:
    """Nor their longer forwards, which differ less, for cheaper proposals of short texts."""
    shapes = {(4, tokens): 0.01 * (tokens + 4) for tokens in (1, 2, 5)}
    timings = Timings(
        (4,),
        ((0.05,),),
        (0.0,),
        (0.0,),
        span_seconds=(shapes,),
        context=100,
        past_seconds=((2e-5, 1e-6),),
    )
    costs = CostTable(timings)

    def real(tokens: int, past: int) -> float:
        return shapes[4, tokens] + 4 * (past - 100) * (2e-5 + 1e-6 * (tokens - 1))

    for past in (100, 900, 40):
        for _ in range(50):
            costs.observe(stepped(0, 2, past, real(2, past)))
            assert costs.slowness == pytest.approx(1)
        for tokens in (1, 2, 5):
            assert costs.forward_seconds(0, 4, tokens) == pytest.approx(real(tokens, past))
    costs.observe(stepped(0, 1, 0, 0.01))
    assert costs.forward_seconds(0, 4, 1) > 0


def test_what_texts_share_is_counted_once_whatever_their_number() -> None:
    """A step of one of them stands on as many tokens, and says nothing of the others' price."""
    shapes = {(batch, 1): 0.01 * batch for batch in (1, 4)}
    timings = Timings(
        (1, 4),
        ((0.01, 0.04),),
        (0.0, 0.0),
        (0.0, 0.0),
        span_seconds=(shapes,),
        context=100,
        past_seconds=((2e-5, 1e-6),),
    )
    costs = CostTable(timings)

    def real(batch: int, shared: int) -> float:
        own = (batch * (600 - shared) - batch * 100) * 2e-5
        return 0.01 * batch + own + shared * (2e-5 + 1e-6 * (batch - 1))

    for shared in (500, 0):
        for batch in (4, 1, 4, 1):
            costs.observe(
                stepped(0, 1, 600, real(batch, shared), batch, shared if batch > 1 else 0)
            )
            assert costs.slowness == pytest.approx(1)
            assert costs.forward_seconds(0, 4, 1) == pytest.approx(real(4, shared))
            assert costs.forward_seconds(0, 1, 1) == pytest.approx(real(1, shared))


def test_what_a_token_of_the_past_takes_is_timed() -> None:
    engine, _ = make_engine((0.01, 0.001), (0.1, 0.01), past=(1e-5, 3e-5))
    costs = calibrate(engine, BOTH)
    assert costs is not None
    assert costs.timings.past_seconds[0] == pytest.approx((1e-5, 0))
    assert costs.timings.past_seconds[1] == pytest.approx((3e-5, 0))

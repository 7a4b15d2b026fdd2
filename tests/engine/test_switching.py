"""When the controller chooses anew, what it learns of the steps before, and what is too little."""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import replace

import pytest

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, LookupParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import Delivery, StepStats
from server.decoding.strategies import SharedCoins, Strategies
from server.engine.controller import Controller
from server.engine.cost_table import CostTable
from tests.engine.test_controller import make_costs

CONTRASTIVE = Combination.contrastive(2, 0.1)
AUTO = DecodingParams("auto", CONTRASTIVE, (1, 1), is_gamma_auto=True)
SPECULATIVE = replace(AUTO, strategy="speculative")


def make_controller(costs: CostTable, max_gamma: int = 1) -> Controller:
    return Controller(costs, Strategies(SharedCoins(0)), max_gamma)


def make_sequence(decoding: DecodingParams = SPECULATIVE) -> Sequence:
    return Sequence.start("s", [1, 2], SamplingParams(), decoding)


def step(model: int = 0, seconds: float = 0.01, batch: int = 1) -> StepStats:
    return StepStats(model, batch, batch, batch, forward_seconds=seconds, step_seconds=seconds)


def settle_acceptance(subject: Controller, sequence: Sequence, rate: float) -> None:
    """Whatever was seen of it before."""
    for model in (0, 1) * 4000:
        subject.add(sequence, model, rate)


def pass_steps(subject: Controller, running: Row[Sequence], num_steps: int) -> list[DecodingParams]:
    """Steps without a token, which teach nothing; what is chosen after each."""
    chosen = []
    for _ in range(num_steps):
        subject.observe(step(), running, len(running))
        chosen.append(subject.choose(running[0]))
        for sequence in running:
            sequence.schedule = subject.choose(sequence)
    return chosen


def test_between_two_ways_that_are_about_as_fast_nothing_is_exchanged() -> None:
    """It takes 3 % to leave for longer proposals, and as much to come back."""
    costs = make_costs((0.08, 0, 0), (0.1, 0, 0))
    subject = make_controller(costs, max_gamma=2)
    sequence = make_sequence()
    left = []
    for rate in (0.56, 0.64, 0.72, 0.80, 0.72, 0.64, 0.56):
        settle_acceptance(subject, sequence, rate)
        before = subject.choose(sequence)
        pass_steps(subject, [sequence], 16)
        after = subject.choose(sequence)
        seconds = {
            way: subject._predictor.token_seconds(way, subject._groups.of(sequence).rates, 1)
            for way in subject._groups.of(sequence).choices
        }
        gain = seconds[before] / min(seconds.values())
        assert (before != after) is (gain > 1.03)
        left.append((before != after, gain > 1))
    assert left.count((True, True)) == 2
    assert left.count((False, True)) >= 2, "others would have promised a little"


@pytest.mark.parametrize("rate", [0.0, 0.04, 0.08, 0.12])
def test_what_is_timed_must_promise_more_than_standard_decoding_by_a_margin(rate: float) -> None:
    costs = make_costs((0.04, 0, 0), (0.1, 0, 0))
    decoding = replace(AUTO, is_gamma_auto=False)
    subject = make_controller(costs)
    sequence = make_sequence(decoding)
    settle_acceptance(subject, sequence, rate)
    for _ in range(40):
        for model, tokens in ((0, 1), (1, 1), (0, 2), (1, 2)):
            stats = StepStats(model, 1, 1, tokens, forward_seconds=(0.04, 0.1)[model])
            costs.observe(stats)
    chosen = pass_steps(subject, [sequence], 64)[-1]
    group = subject._groups.of(sequence)
    standard, *others = (
        subject._predictor.token_seconds(way, group.rates, 1) for way in group.choices
    )
    assert (chosen.strategy != "standard") is (standard / min(others) >= 1.03)


def test_another_batch_is_looked_at_after_few_steps() -> None:
    """And all ways are, for others than before may be good there."""
    subject = make_controller(make_costs((0.08, 0, 0), (0.1, 0, 0)))
    running = [make_sequence() for _ in range(20)]
    group = subject._groups.of(running[0])
    pass_steps(subject, running[:16], 4)
    assert (subject._batch, group.num_left) == (16, 3)
    pass_steps(subject, running[:15], 15)
    assert (subject._batch, group.num_left) == (16, 3), "it is about the same"
    pass_steps(subject, running[:15], 1)
    assert (subject._batch, group.num_left) == (15, 2)
    pass_steps(subject, running[:4], 4)
    assert (subject._batch, group.num_left) == (4, 3)
    pass_steps(subject, running, 4)
    assert (subject._batch, group.num_left) == (20, 3)


def test_a_batch_that_lasts_for_few_steps_is_not_chosen_for() -> None:
    """While the next text begins, one fewer is decoded."""
    subject = make_controller(make_costs((0.08, 0, 0), (0.1, 0, 0)))
    running = [make_sequence() for _ in range(4)]
    pass_steps(subject, running, 4)
    batches = []
    for _ in range(4):
        for count, num_steps in ((4, 15), (3, 3), (4, 1)):
            pass_steps(subject, running[:count], num_steps)
            batches.append(subject._batch)
    assert set(batches) == {4}
    group = subject._groups.of(running[0])
    assert group.num_left == 3, "it was chosen four times more, after 16 steps each"
    pass_steps(subject, running[:3], 4)
    assert subject._batch == 3


def test_intervals_in_which_nobody_decodes_end_too() -> None:
    subject = make_controller(make_costs((0.08, 0, 0), (0.1, 0, 0)))
    for _ in range(8):
        subject.observe(StepStats(0, 1, 0, 9, 9), [], 0)
    pass_steps(subject, [make_sequence()], 16)
    assert subject._batch == 1


def test_intervals_end_where_sequences_are_as_a_step_left_them() -> None:
    """Not between steps that were all enqueued before the first was looked at."""
    subject = make_controller(make_costs((0.08, 0, 0), (0.1, 0, 0)))
    sequence = make_sequence()
    sequence.schedule = subject.choose(sequence)
    for _ in range(40):
        subject.observe(step(), [sequence], 1, is_last=False)
    assert subject._interval.num_steps == 40
    subject.observe(step(), [sequence], 1)
    assert subject._interval.num_steps == 0


def test_only_steps_after_some_with_one_choice_tell_what_it_takes() -> None:
    """At first all windows begin together, and cost forwards before they give tokens."""
    subject = make_controller(make_costs((0.08, 0, 0), (0.1, 0, 0)))
    sequence = make_sequence()
    sequence.schedule = subject.choose(sequence)
    stats = step()
    stats.deliveries = [Delivery(sequence.schedule, 1, has_first=False)]
    counted = []
    for _ in range(12):
        subject.observe(stats, [sequence], 1)
        counted.append(subject._interval.total_tokens)
    assert counted == [0] * 9 + [1, 2, 3]


def real_ratio(
    costs: CostTable,
    slowness: float = 1.0,
    num_looked_up: int = 0,
    others: Row[Sequence] = (),
    others_from: int = 0,
) -> float:
    """What is learnt of a way that takes three times as many steps as predicted, or nearly.

    All steps take `slowness` times what was timed, and propose `num_looked_up` tokens by lookup;
    `others` decode meanwhile, from the given step of each interval on.
    """
    subject = make_controller(costs)
    sequence = make_sequence()
    sequence.schedule = subject.choose(sequence)
    for number in range(480):
        stats = step(number % 2, slowness * (0.01, 0.02)[number % 2])
        stats.num_looked_up = num_looked_up
        if number % 4 == 3:
            stats.deliveries = [Delivery(sequence.schedule, 1, has_first=False)]
        costs.observe(stats)
        present = others if number % 16 >= others_from else ()
        subject.observe(stats, [sequence, *present], 1)
    return subject._reality.value(sequence.schedule, 1)


def test_what_a_way_takes_is_learnt_on_a_machine_of_any_speed() -> None:
    learnt = real_ratio(make_costs((0.01, 0, 0), (0.02, 0, 0)))
    assert 2 < learnt < 3
    slow = real_ratio(make_costs((0.01, 0, 0), (0.02, 0, 0)), slowness=3.0)
    assert slow == pytest.approx(learnt, rel=0.05)


def test_nothing_is_learnt_of_steps_that_others_took_part_in() -> None:
    costs = make_costs((0.01, 0, 0), (0.02, 0, 0))
    assert real_ratio(costs, num_looked_up=1) == 1.0
    fixed = replace(SPECULATIVE, strategy="standard", is_gamma_auto=False)
    assert real_ratio(costs, others=[make_sequence(fixed)]) == 1.0
    assert real_ratio(costs, others=[make_sequence(replace(AUTO, gamma=(3, 1)))]) == 1.0
    behind = [make_sequence()]  # has not taken up the choice
    assert real_ratio(costs, others=behind) == 1.0
    assert real_ratio(costs, others=behind, others_from=12) == 1.0, "though most steps are pure"


def test_seconds_are_predicted_by_the_table_as_it_is_now() -> None:
    """Of two models the one that is to propose has become dear since."""
    costs = make_costs((0.01, 0, 0), (0.1, 0, 0))
    subject = make_controller(costs)
    sequence = make_sequence(replace(AUTO, is_gamma_auto=False))
    settle_acceptance(subject, sequence, 0.7)
    assert subject.choose(sequence).strategy != "standard"
    sequence.schedule = subject.choose(sequence)
    for _ in range(200):
        for model, tokens, seconds in ((0, 1, 0.1), (1, 1, 0.1), (0, 2, 1.0), (1, 2, 1.0)):
            stats = StepStats(model, 1, 1, tokens, forward_seconds=seconds, step_seconds=seconds)
            costs.observe(stats)
            subject.observe(stats, [sequence], 1)
            sequence.schedule = subject.choose(sequence)
    assert subject.choose(sequence).strategy == "standard"


def test_looking_up_must_promise_more_than_not_by_a_margin() -> None:
    subject = make_controller(make_costs((0.1, 0, 0), (0.1, 0, 0)))
    sequence = make_sequence(replace(SPECULATIVE, lookup=LookupParams(4, 2, 1)))
    chosen = subject.choose(sequence)
    group = subject._groups.of(sequence)
    assert group.lookup is not None
    seconds = subject._predictor.token_seconds(chosen, group.rates, 1)
    assert group.lookup.token_seconds == pytest.approx(seconds / 1.03)


def test_half_batches_are_looked_at_for_how_most_sequences_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And for all of them, though each half then is a batch of its own."""
    costs = make_costs((0.1, 0.01, 0), (0.1, 0.01, 0))
    subject = Controller(costs, Strategies(SharedCoins(0)), 1, (0, 1), half_batches=None)
    asked: list[tuple[str, int]] = []

    def look(decoding: DecodingParams, acceptance: tuple[float, ...], batch: int) -> None:
        asked.append((decoding.strategy, batch))
        subject._half_batches.is_on = True

    monkeypatch.setattr(subject._half_batches, "look", look)
    fixed = make_sequence(replace(SPECULATIVE, strategy="standard", is_gamma_auto=False))
    running = [*(make_sequence() for _ in range(15)), fixed]
    for sequence in running[:-1]:
        sequence.schedule = subject.choose(sequence)
    for _ in range(32):
        subject.observe(step(), running, 16)
    assert subject.halves
    assert set(asked) == {("speculative", 16)}
    assert subject._batch == 8

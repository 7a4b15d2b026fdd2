"""Strategies and lengths chosen while a text is written: the law stays, and the choice is good."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from server.config import StrategyName
from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import Delivery, StepStats
from server.decoding.profile import Chain
from server.decoding.strategies import SharedCoins, Strategies
from server.engine import distributions, probes
from server.engine.choices import make_choices
from server.engine.controller import Controller
from server.engine.cost_table import CostTable, Timings
from server.engine.engine import Engine
from server.engine.predictor import Predictor
from server.engine.rates import Rates
from tests.support.engines import decode, generated, make_decoding, make_engine, run
from tests.support.exact import Z_LIMIT, chi_square_z, exact_law, target
from tests.support.table_lm import TableLM

PROMPT = [0, 2, 1]
WEIGHTED = Combination.weighted([0.3, 0.7])
CONTRASTIVE = Combination.contrastive(2, 0.4)
THREE = Combination.weighted([0.2, 0.5, 0.3])


def auto(combination: Combination, mixture: bool = False) -> DecodingParams:
    lengths = (2, *[1] * (len(combination.weights) - 1))
    return DecodingParams("auto", combination, lengths, shared_coins=mixture, is_gamma_auto=True)


def make_costs(*models: tuple[float, float, float]) -> CostTable:
    """Each model takes base + by sequence + by token seconds."""
    shapes = [(batch, tokens) for batch in (1, 4, 16, 64) for tokens in (1, 2, 5)]
    return CostTable(
        Timings(
            (1, 4, 16, 64),
            tuple(
                tuple(base + (each + token) * batch for batch in (1, 4, 16, 64))
                for base, each, token in models
            ),
            (0.0,) * 4,
            (0.0,) * 4,
            2,
            tuple(
                {
                    (batch, tokens): base + each * batch + token * batch * tokens
                    for batch, tokens in shapes
                }
                for base, each, token in models
            ),
        )
    )


class Whimsical:
    """Chooses at random, or by the last token: whatever the past allows."""

    def __init__(self, choices: tuple[DecodingParams, ...], by_history: bool) -> None:
        self._choices = choices
        self._random = random.Random(7)
        self._by_history = by_history
        self.seen: set[DecodingParams] = set()

    def choose(self, sequence: Sequence) -> DecodingParams:
        place = hash(tuple(sequence.token_ids)) if self._by_history else self._random.getrandbits(9)
        chosen = self._choices[place % len(self._choices)]
        self.seen.add(chosen)
        return chosen

    def add(self, sequence: Sequence, model: int, accepted: float) -> None:
        """Learns nothing."""

    def lookup_length(self, sequence: Sequence, rate: float, num_found: int) -> int:
        return self._random.randrange(num_found + 1)


def capricious(
    lms: list[TableLM], decoding: DecodingParams, by_history: bool
) -> tuple[Engine, Whimsical]:
    engine = make_engine(lms, max_sequences=500, max_step_tokens=4096, max_gamma=4)
    every = make_choices(decoding, 4)
    kinds = {choice.strategy for choice in every}
    # A few of each strategy, or cos would crowd out the others.
    few = [c for kind in sorted(kinds) for c in [c for c in every if c.strategy == kind][:4]]
    silent = [choice for choice in every if choice.gamma[0] == 0][:2]
    chooser = Whimsical((*few, *silent), by_history)
    engine._strategies.chooser = chooser
    return engine, chooser


@pytest.mark.parametrize(
    ("combination", "is_seeded", "by_history"),
    [
        (WEIGHTED, False, True),
        (CONTRASTIVE, False, False),
        (THREE, False, True),
        (THREE, True, False),
    ],
)
def test_law_under_arbitrary_switching(
    combination: Combination, is_seeded: bool, by_history: bool
) -> None:
    lms = [TableLM(seed=11 + k) for k in range(len(combination.weights))]
    params = [SamplingParams(max_tokens=5, seed=s, is_seeded=is_seeded) for s in range(1200)]
    engine, chooser = capricious(lms, auto(combination), by_history)
    samples = decode(engine, PROMPT, params, auto(combination))
    assert chi_square_z(samples, exact_law(lms, combination, params[0], PROMPT)) < Z_LIMIT
    assert {choice.strategy for choice in chooser.seen} == {"standard", "cos", "speculative"}
    engine.scheduler.check_integrity()


def test_tokens_count_for_the_way_they_were_decoded() -> None:
    """Not for the one that begins behind them."""
    lms = [TableLM(seed=11 + k) for k in range(2)]
    engine, _ = capricious(lms, auto(WEIGHTED), by_history=True)
    steps: list[StepStats] = []
    engine.observer.on_step = steps.append
    params = [SamplingParams(max_tokens=40, seed=seed) for seed in range(5)]
    sequences = [Sequence.start(f"{p.seed}", PROMPT, p, auto(WEIGHTED)) for p in params]
    for sequence in sequences:
        engine.add(sequence)
    expected: list[Counter[str]] = [Counter() for _ in sequences]
    while engine.has_work:
        ways = [sequence.schedule.strategy for sequence in sequences]
        for delta in engine.step():
            place = int(delta.sequence_id)
            expected[place][ways[place]] += len(delta.token_ids)
    found = [Counter(sequence.stats.strategies) for sequence in sequences]
    assert found == expected
    assert len({way for counter in found for way in counter}) > 1
    delivered: Counter[str] = Counter()
    for step in steps:
        for delivery in step.deliveries:
            delivered[delivery.decoding.strategy] += delivery.num_tokens
    assert delivered == sum(found, Counter())


class Nosy:
    """Chooses by the tokens that were dropped behind the last rejection."""

    def __init__(self, choices: tuple[DecodingParams, ...]) -> None:
        self._choices = choices
        self.dropped: dict[str, tuple[int, ...]] = {}

    def choose(self, sequence: Sequence) -> DecodingParams:
        dropped = self.dropped.get(sequence.id, ())
        return self._choices[sum(dropped) % len(self._choices)]

    def add(self, sequence: Sequence, model: int, accepted: float) -> None:
        """Learns nothing."""

    def lookup_length(self, sequence: Sequence, rate: float, num_found: int) -> int:
        return 0


@pytest.mark.parametrize("is_fresh", [True, False])
def test_law_where_choices_depend_on_dropped_proposals(
    is_fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh randomness after a rejection is what keeps it: with the same again, it is biased."""
    lms = [TableLM(seed=11 + k) for k in range(2)]
    choices = tuple(make_decoding("speculative", WEIGHTED, gamma) for gamma in (2, 3, 4))
    plain = make_decoding("standard", WEIGHTED)
    chooser = Nosy((choices[2], plain, choices[0]))
    recover = Sequence.recover

    def note(sequence: Sequence, token_id: int) -> None:
        chooser.dropped[sequence.id] = tuple(sequence.token_ids[sequence.num_verified + 1 :])
        recover(sequence, token_id)

    monkeypatch.setattr(Sequence, "recover", note)
    if not is_fresh:
        monkeypatch.setattr(distributions, "round_seed", lambda seed, num_rejections: seed)
    engine = make_engine(lms, max_sequences=500, max_step_tokens=4096, max_gamma=4)
    engine._strategies.chooser = chooser
    params = [SamplingParams(max_tokens=4, seed=s) for s in range(2000)]
    samples = decode(engine, PROMPT, params, auto(WEIGHTED))
    z = chi_square_z(samples, exact_law(lms, WEIGHTED, params[0], PROMPT))
    assert (z < Z_LIMIT) == is_fresh


@pytest.mark.parametrize("by_history", [False, True])
def test_law_of_each_sequence_that_enters_and_leaves_shared_coins(by_history: bool) -> None:
    """One of each batch is sampled; the others keep the stream of coins busy."""
    lms = [TableLM(seed=11 + k, vocab_size=2, spread=3.0) for k in range(2)]
    decoding = auto(WEIGHTED, mixture=True)
    engine, chooser = capricious(lms, decoding, by_history)
    samples = []
    for batch in range(500):
        sequences = [
            Sequence.start(
                f"{batch}-{k}",
                [0] * (1 + k),
                SamplingParams(max_tokens=6, seed=3 * batch + k),
                decoding if k else make_decoding("mixture", WEIGHTED, 3, 1, shared_coins=True),
            )
            for k in range(3)
        ]
        samples.append(generated(run(engine, sequences)[f"{batch}-1"]))
    law = exact_law(lms, WEIGHTED, SamplingParams(max_tokens=6), [0, 0])
    assert chi_square_z(samples, law) < Z_LIMIT
    assert "mixture" in {choice.strategy for choice in chooser.seen}


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"is_seeded": True}])
def test_fixed_texts_do_not_depend_on_what_is_chosen(params: dict[str, float]) -> None:
    lms = [TableLM(seed=40 + k, vocab_size=12) for k in range(2)]
    each = [SamplingParams(max_tokens=20, seed=seed, **params) for seed in range(6)]  # type: ignore[arg-type]
    plain = decode(make_engine(lms), PROMPT, each, make_decoding("standard", CONTRASTIVE))
    for by_history in (False, True):
        engine, _ = capricious(lms, auto(CONTRASTIVE), by_history)
        assert decode(engine, PROMPT, each, auto(CONTRASTIVE)) == plain


@pytest.mark.parametrize("mixture", [False, True])
def test_law_under_the_real_controller(mixture: bool) -> None:
    lms = [TableLM(seed=11 + k) for k in range(2)]
    engine = make_engine(lms, max_sequences=8)
    engine.control(make_costs((0.01, 0.001, 0.0), (0.03, 0.001, 0.0)))
    params = [SamplingParams(max_tokens=4, seed=seed) for seed in range(1000)]
    samples = decode(engine, PROMPT, params, auto(WEIGHTED, mixture))
    assert chi_square_z(samples, exact_law(lms, WEIGHTED, params[0], PROMPT)) < Z_LIMIT


def test_who_was_preempted_takes_up_no_choice_before_its_next_token() -> None:
    """As at its first one: while it is read, others would look at coins that it joined at."""
    lms = [TableLM(seed=11 + k) for k in range(2)]
    engine, chooser = capricious(lms, auto(WEIGHTED, mixture=True), by_history=False)
    params = SamplingParams(max_tokens=40, seed=1)
    sequence = Sequence.start("s", PROMPT, params, auto(WEIGHTED, mixture=True))
    engine.add(sequence)
    while sequence.num_generated < 3 or sequence.num_pending:
        engine.step()
    engine.scheduler._preempt(sequence)
    schedule = sequence.schedule
    chooser._choices = tuple(each for each in chooser._choices if each != schedule)
    engine.step()
    assert sequence.is_resuming
    assert sequence.schedule == schedule


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_proposes_nothing_is_judged_by_what_would_have_been_accepted(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_PERIOD", 1)
    monkeypatch.setattr(probes, "_STEPS", 1)
    judged: list[tuple[int, list[int], float]] = []

    class Plain(Whimsical):
        def add(self, sequence: Sequence, model: int, accepted: float) -> None:
            judged.append((model, list(sequence.token_ids), accepted))

    lms = [TableLM(seed=11 + k) for k in range(2)]
    engine = make_engine(lms)
    engine._strategies.chooser = Plain((make_decoding("standard", CONTRASTIVE),), False)
    params = SamplingParams(max_tokens=30, seed=3, temperature=temperature)
    decode(engine, PROMPT, [params], auto(CONTRASTIVE))
    assert {model for model, _, _ in judged} == {0, 1}
    for model, (*before, _), accepted in judged:
        made = before[len(PROMPT) :]
        wanted = target(lms, CONTRASTIVE, params, PROMPT, made)
        own = target(lms, Combination.only(2, model), params, PROMPT, made)
        assert accepted == pytest.approx(np.minimum(own, wanted).sum(), abs=1e-5)


def test_of_many_combinations_few_choose_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one choice takes is taken between two tokens of everybody."""
    decided: list[list[Combination]] = []
    original, observe = Controller._decide, Controller.observe

    def note(self: Controller, group: Any, members: Any) -> None:
        decided[-1].append(group.chosen.combination)
        original(self, group, members)

    def begin(self: Controller, *args: Any) -> None:
        decided.append([])
        observe(self, *args)

    monkeypatch.setattr(Controller, "_decide", note)
    monkeypatch.setattr(Controller, "observe", begin)
    engine = make_engine([TableLM(seed=11 + k) for k in range(2)], max_gamma=8)
    engine.control(make_costs((0.01, 0.001, 0.0), (0.03, 0.001, 0.0)))
    combinations = [Combination.weighted([0.01 * k, 1 - 0.01 * k]) for k in range(1, 13)]
    sequences = [
        Sequence.start(f"{k}", PROMPT, SamplingParams(max_tokens=60, seed=k), auto(combination))
        for k, combination in enumerate(combinations)
    ]
    decided.append([])
    for sequence in sequences:
        engine.add(sequence)
    engine.step()
    assert set(decided[0]) == set(combinations)  # for each that begins
    del decided[:-1]
    decided[0].clear()
    while all(not sequence.is_finished for sequence in sequences) and len(decided) < 60:
        engine.step()
    times = [each for each in decided if each]
    assert all(len(each) <= 4 for each in times)
    assert len({combination for each in times[:3] for combination in each}) == 12


def controller(costs: CostTable) -> Controller:
    return Controller(costs, Strategies(SharedCoins(0)), max_gamma=8)


def show(costs: CostTable, subject: Controller, model: int, sequences: list[Sequence]) -> None:
    """A step of the way that is chosen, which takes what was timed."""
    batch = len(sequences)
    chosen = subject.choose(sequences[0])
    for sequence in sequences:
        sequence.schedule = chosen
    most = 1 if chosen.strategy == "standard" else 1 + max(chosen.gamma)
    for tokens in range(1, 1 + most):
        seconds = costs._timed(model, batch, tokens, costs._context)
        stats = StepStats(
            model,
            num_sequences=batch,
            num_decoding=batch,
            num_tokens=batch * tokens,
            forward_seconds=seconds,
            step_seconds=seconds,
        )
        costs.observe(stats)
        subject.observe(stats, sequences, batch)


def best(costs: CostTable, decoding: DecodingParams, acceptance: float, batch: int) -> str:
    """What is chosen once the acceptance of both models is known."""
    subject = controller(costs)
    sequences = [
        Sequence.start(f"s{i}", [1], SamplingParams(seed=i), decoding) for i in range(batch)
    ]
    rng = random.Random(1)
    for _ in range(300):
        for model in (0, 1):
            subject.add(sequences[0], model, float(rng.random() < acceptance))
    for step in range(200):
        show(costs, subject, step % 2, sequences)
    chosen = subject.choose(sequences[0])
    return f"{chosen.strategy}-{chosen.gamma[0]}"


def test_what_is_chosen_is_of_the_combination_that_was_asked_for() -> None:
    """Though parameters of requests that are gone leave their memory to others."""
    costs = make_costs((0.01, 0, 0), (0.1, 0, 0))
    subject = Controller(costs, Strategies(SharedCoins(0)), max_gamma=1)
    for number in range(2, 9):
        for weight in (0.5, 0.5, 1 / (1 + number)):
            decoding = auto(Combination.weighted([weight, 1 - weight]))
            sequence = Sequence.start("s", [1], SamplingParams(), decoding)
            assert subject.choose(sequence).combination == decoding.combination
            del sequence, decoding


def test_greedy_seeded_and_other_texts_are_learnt_apart() -> None:
    """What is proposed is accepted by another rule for each."""
    subject = controller(make_costs((0.01, 0, 0), (0.1, 0, 0)))
    kinds = {
        0.9: SamplingParams(temperature=0.0),
        0.1: SamplingParams(is_seeded=True),
        0.5: SamplingParams(),
    }
    sequences = {
        rate: Sequence.start("s", [1], params, auto(CONTRASTIVE)) for rate, params in kinds.items()
    }
    for _ in range(400):
        for rate, sequence in sequences.items():
            subject.add(sequence, 0, rate)
    for rate, sequence in sequences.items():
        assert subject._acceptance.mean([sequence])[0] == pytest.approx(rate, abs=0.02)
    assert len({id(subject._groups.of(sequence)) for sequence in sequences.values()}) == 3


def test_acceptance_is_that_of_all_texts_at_hand() -> None:
    subject = controller(make_costs((0.01, 0, 0), (0.1, 0, 0)))
    good, bad = (Sequence.start(id, [1], SamplingParams(), auto(CONTRASTIVE)) for id in "gb")
    good.stats.accepted[0] = good.stats.verified[0] = bad.stats.verified[0] = 200
    mean = subject._acceptance.mean
    (high, _), (low, _) = mean([good]), mean([bad])
    assert high > 0.9
    assert low < 0.1
    assert mean([good, bad])[0] == pytest.approx((high + low) / 2)


def test_of_half_batches_each_is_a_batch() -> None:
    costs = make_costs((0.01, 0, 0), (0.1, 0, 0))
    subject = Controller(costs, Strategies(SharedCoins(0)), 8, (0, 1), half_batches=True)
    sequence = Sequence.start("s", [1], SamplingParams(), auto(CONTRASTIVE))
    sequence.schedule = subject.choose(sequence)
    for _ in range(16):
        subject.observe(StepStats(0, 15, 15, 15), [sequence], 15)
    assert subject._batch == 8


def test_a_model_of_a_mixture_runs_as_often_as_its_coin_says() -> None:
    """However many tokens it then has to catch up with."""
    predictor = Predictor(make_costs((1.0, 0, 0), (2.0, 0, 0)), Strategies(SharedCoins(0)))
    decoding = make_decoding("mixture", Combination.weighted([0.05, 0.95]), shared_coins=True)
    seconds = predictor.token_seconds(decoding, Rates((0.8, 0.8)), 1)
    assert seconds == pytest.approx(0.05 * 1.0 + 0.95 * 2.0)


def test_it_speculates_where_that_pays_and_not_where_it_does_not() -> None:
    flat = make_costs((0.01, 0, 0), (0.1, 0, 0))  # more rows cost nothing
    full = make_costs((0.01, 0, 0.01), (0.01, 0, 0.1))  # nothing but rows costs
    assert best(flat, auto(CONTRASTIVE), 0.9, 1) in ("cos-8", "cos-6")
    assert best(flat, auto(CONTRASTIVE), 0.4, 1) in ("cos-1", "cos-2")
    assert best(full, auto(CONTRASTIVE), 0.4, 32).startswith("standard")
    half = make_costs((0.01, 0, 0.01), (0.1, 0, 0.05))
    assert best(half, auto(CONTRASTIVE), 0.9, 1) != "standard-2"


def test_it_takes_the_mixture_where_it_may() -> None:
    even = make_costs((0.1, 0, 0), (0.1, 0, 0))
    assert best(even, auto(Combination.weighted([0.5, 0.5]), mixture=True), 0.7, 16) == "mixture-2"
    assert best(even, auto(Combination.weighted([0.5, 0.5])), 0.7, 16).startswith("cos")


def test_only_the_mixture_shares_coins() -> None:
    choices = make_choices(auto(Combination.weighted([0.5, 0.5]), mixture=True), 8)
    assert [choice.strategy for choice in choices if choice.shared_coins] == ["mixture"]


def test_who_never_opens_proposes_several_tokens_or_leaves_it() -> None:
    """One at a time it would be a round of standard decoding, with a proposal besides."""
    choices = make_choices(auto(CONTRASTIVE), 8)
    silent = [choice.gamma[1] for choice in choices if choice.gamma[0] == 0]
    assert min(silent) == 2


def test_a_fixed_part_stays_fixed() -> None:
    for strategy in ("cos", "speculative"):
        choices = make_choices(replace(auto(CONTRASTIVE), strategy=strategy), 8)
        assert {choice.strategy for choice in choices} == {strategy}
        assert len({choice.gamma for choice in choices}) > 4
    lengths = replace(auto(CONTRASTIVE), gamma=(3, 2), is_gamma_auto=False)
    assert {c.gamma for c in make_choices(lengths, 8) if c.strategy == "cos"} == {(3, 2)}
    assert all(max(c.gamma) <= 2 for c in make_choices(auto(CONTRASTIVE), 2))


def test_what_turns_out_slower_than_predicted_is_left() -> None:
    """More steps than the profile has, say, because the batch splits."""
    costs = make_costs((0.03, 0, 0), (0.3, 0, 0))
    subject = controller(costs)
    sequence = Sequence.start("s", [1], SamplingParams(), auto(CONTRASTIVE))
    taken = []
    for _ in range(2400):
        chosen = subject.choose(sequence)
        sequence.schedule = chosen
        # As many forwards as standard decoding for a token, and some more of the first model.
        has_more = chosen.strategy != "standard"
        for model, seconds in ((0, 0.03), (1, 0.3), *[(0, 0.03)] * 5 * has_more):
            stats = StepStats(model, 1, 1, 1, forward_seconds=seconds, step_seconds=seconds)
            if model:
                stats.deliveries = [Delivery(chosen, 1, has_first=False)]
            costs.observe(stats)
            subject.observe(stats, [sequence], 1)
        taken.append(chosen.strategy)
    assert set(taken[:200]) > {"standard"}
    late = taken[600:]
    assert 0 < sum(strategy != "standard" for strategy in late) < 0.15 * len(late), "it looks again"


def test_windows_cut_by_choices_are_not_left_out() -> None:
    """Else only intervals with more tokens than steps would tell what cos really takes."""
    costs = make_costs((0.01, 0, 0), (0.02, 0, 0))
    subject = Controller(costs, Strategies(SharedCoins(0)), max_gamma=1)
    decoding = replace(auto(CONTRASTIVE), strategy="speculative")
    sequence = Sequence.start("s", [1], SamplingParams(), decoding)
    sequence.schedule = subject.choose(sequence)
    for _ in range(40):
        for model, seconds in (*[(0, 0.01)] * 20, (1, 0.02)):
            stats = StepStats(model, 1, 1, 1, forward_seconds=seconds, step_seconds=seconds)
            if model:
                stats.deliveries = [Delivery(sequence.schedule, 1, has_first=False)]
            subject.observe(stats, [sequence], 1)
    real = subject._reality.value(sequence.schedule, 1)
    assert real > 2, "intervals of 16 steps have at most one token"


def spells(acceptance: float, prompts_beside_proposals: bool) -> list[tuple[str, int, float]]:
    """What one text is decoded by: (strategy, steps on end, seconds of decoding before them).

    All steps take what was timed, and those of a way that proposes may read prompts, too.
    """
    costs = make_costs((0.04, 0, 0), (0.1, 0, 0))
    subject = controller(costs)
    decoding = replace(auto(CONTRASTIVE), is_gamma_auto=False)
    sequence = Sequence.start("s", [1], SamplingParams(), decoding)
    for model in (0, 1) * 300:
        subject.add(sequence, model, acceptance)
    found: list[tuple[str, int, float]] = []
    now = 0.0
    for step in range(2000):
        sequence.schedule = chosen = subject.choose(sequence)
        if not found or found[-1][0] != chosen.strategy:
            found.append((chosen.strategy, 0, now))
        found[-1] = (chosen.strategy, found[-1][1] + 1, found[-1][2])
        seconds = (0.04, 0.1)[step % 2]
        stats = StepStats(step % 2, 1, 1, 1, forward_seconds=seconds, step_seconds=seconds)
        stats.prefill_seconds = 0.0
        if prompts_beside_proposals and chosen.strategy != "standard":
            stats.num_tokens, stats.num_prefill_tokens = 9, 8
        costs.observe(stats)
        subject.observe(stats, [sequence], 1)
        now += seconds
    return found


def test_a_trial_that_times_nothing_ends() -> None:
    """Steps that read prompts say nothing of forwards, however many there are."""
    found = spells(acceptance=0.3, prompts_beside_proposals=True)
    assert found[0][:2] == ("standard", 16), "timed before"
    trials = [spell for spell in found if spell[0] != "standard"]
    assert [steps for _, steps, _ in trials] == [48, 48]
    assert trials[1][2] - trials[0][2] > 120


def test_what_cannot_pay_is_not_tried() -> None:
    """By a little: with a few proposals more that are accepted it would be."""
    assert [strategy for strategy, *_ in spells(0.25, False)] == ["standard"]
    assert "cos" in {strategy for strategy, *_ in spells(0.3, False)}


def test_a_proposer_that_does_not_score_is_tried_again() -> None:
    """Standard decoding never runs it, so nothing else would show that it has become good."""
    costs = make_costs((0.01, 0, 0), (0.1, 0, 0))
    subject = controller(costs)
    sequence = Sequence.start("s", [1], SamplingParams(), auto(Combination.weighted([0.0, 1.0])))
    for _ in range(400):
        subject.add(sequence, 0, 0.0)
    chosen = []
    for _ in range(8000):
        chosen.append(subject.choose(sequence).strategy)
        sequence.schedule = subject.choose(sequence)
        stats = StepStats(1, 1, 1, 1, forward_seconds=0.1, step_seconds=0.1)
        stats.prefill_seconds = 0.0
        stats.deliveries = [Delivery(sequence.schedule, 1, has_first=False)]
        costs.observe(stats)
        subject.observe(stats, [sequence], 1)
    assert set(chosen[100:600]) == {"standard"}
    assert set(chosen[600:]) > {"standard"}


@pytest.mark.parametrize("gamma", [None, (0, 3)])
def test_what_nobody_tests_is_forgotten(gamma: tuple[int, int] | None) -> None:
    """A mixture verifies no proposals and is not probed; cos tests those who propose."""
    combination = Combination.weighted([0.5, 0.5])
    decoding = make_decoding("cos", combination, gamma) if gamma else auto(combination, True)
    subject = controller(make_costs((0.1, 0, 0), (0.1, 0, 0)))
    sequence = Sequence.start("s", [1], SamplingParams(), decoding)
    subject.choose(sequence)
    group = subject._groups.of(sequence)
    for model in (0, 1) * 400:
        subject.add(sequence, model, 0.0)
    if gamma is None:
        [group.chosen] = [choice for choice in group.choices if choice.strategy == "mixture"]
    group.seconds = 360.0
    subject._fade(group, sequence)
    first, second = subject._acceptance.mean([sequence])
    assert first > 0.05
    assert (second > 0.05) is (gamma is None)


def test_a_bad_spell_is_forgotten_beside_texts_that_choose_nothing() -> None:
    """There nothing is compared with what was predicted, for as long as they are there."""
    subject = controller(make_costs((0.04, 0, 0), (0.1, 0, 0)))
    sequence = Sequence.start("s", [1], SamplingParams(), auto(CONTRASTIVE))
    other = Sequence.start("t", [1], SamplingParams(), make_decoding("standard", CONTRASTIVE))
    choice = make_decoding("cos", CONTRASTIVE, (2, 1))
    subject._reality.add(choice, 2, seconds=30.0, predicted=10.0)
    before = subject._reality.value(choice, 2)
    for _ in range(3000):
        sequence.schedule = subject.choose(sequence)
        stats = StepStats(1, 2, 2, 2, forward_seconds=0.1, step_seconds=0.1)
        stats.prefill_seconds = 0.0
        subject.observe(stats, [sequence, other], 2)
    assert subject._reality.value(choice, 2) < 1 + 0.6 * (before - 1)


def test_dear_draws_are_forgotten_as_fast_as_they_were_learnt() -> None:
    costs = make_costs((0.01, 0.001, 0))
    timings = replace(costs.timings, draw_seconds=(0.001,) * 4)
    costs = CostTable(timings)
    for seconds, times in ((0.02, 3000), (0.001, 9000)):
        for _ in range(times):
            stats = StepStats(0, 1, 1, 1, forward_seconds=0.011, step_seconds=0.011 + seconds)
            stats.num_drawn = 1
            costs.observe(stats)
    assert costs.rest_seconds(1, num_drawn=1) < 0.002


def test_without_costs_auto_is_cos() -> None:
    lms = [TableLM(seed=11 + k) for k in range(2)]
    sequence = Sequence.start("s", PROMPT, SamplingParams(max_tokens=8), auto(CONTRASTIVE))
    run(make_engine(lms), [sequence])
    assert sequence.schedule.strategy == "cos"
    assert sum(sequence.stats.proposed) > 0


@pytest.mark.parametrize("strategy", ["cos", "speculative"])
def test_a_model_that_never_runs_adds_no_states(strategy: str) -> None:
    """Between the two models that a contrast of three is of, with the longest proposals."""
    decoding = make_decoding(strategy, Combination.contrastive(3, 0.1), gamma=(32, 1, 1))
    chain = Chain(decoding, Strategies(SharedCoins(0)).make(decoding))
    shapes = chain.profile((0.7, 0.5, 0.9)).rates
    pair = make_decoding(strategy, Combination.contrastive(2, 0.1), gamma=(32, 1))
    alone = Chain(pair, Strategies(SharedCoins(0)).make(pair)).profile((0.7, 0.9)).rates
    assert {shape.model for shape in shapes} == {0, 2}
    named = {shape._replace(model=shape.model // 2): rate for shape, rate in shapes.items()}
    assert named == pytest.approx(alone)


@pytest.mark.parametrize("gamma", [(3, 1), (0, 3), (2, 2)])
def test_profiles_depend_on_no_other_acceptance_than_that_of_proposers(
    gamma: tuple[int, int],
) -> None:
    for strategy in ("standard", "cos", "speculative"):
        if strategy == "speculative" and not gamma[0]:
            continue
        decoding = make_decoding(strategy, CONTRASTIVE, gamma)
        chain = Chain(decoding, Strategies(SharedCoins(0)).make(decoding))
        for model in range(2):
            acceptance = [(0.7, 0.7), (0.2, 0.7) if model == 0 else (0.7, 0.2)]
            profiles = [chain.profile(rates) for rates in acceptance]
            first, second = [(profile.rates, profile.shares) for profile in profiles]
            assert (first == second) is (model not in chain.proposers)
    assert chain.proposers <= {0, 1}


@pytest.mark.parametrize("gamma", [(3, 1), (2, 2), (4, 1, 1), (3, 1, 1, 1)])
@pytest.mark.parametrize("strategy", ["standard", "cos", "speculative"])
def test_profiles_of_texts_with_few_runs_are_those_of_texts_without(
    strategy: StrategyName, gamma: tuple[int, ...]
) -> None:
    decoding = make_decoding(strategy, Combination.weighted([1 / len(gamma)] * len(gamma)), gamma)
    known = Strategies(SharedCoins(0)).make(decoding)
    acceptance = (0.7, 0.8, 0.9, 0.9)[: len(gamma)]
    free = Chain(decoding, known).profile(acceptance)
    few = Chain(decoding, known, has_forced=True).profile(acceptance, 0.0)  # taken to be 0.01
    assert few.forwards == pytest.approx(free.forwards, rel=0.03)
    assert few.shares == pytest.approx(free.shares, rel=0.03)
    assert 0 <= few.num_forced <= 0.01


@pytest.mark.parametrize("num_models", [2, 3, 4, 8])
def test_all_that_may_be_asked_for_has_a_profile(num_models: int) -> None:
    combination = Combination.weighted([1 / num_models] * num_models)
    decoding = make_decoding("cos", combination, (32, *[4] * (num_models - 1)))
    chain = Chain(decoding, Strategies(SharedCoins(0)).make(decoding), has_forced=True)
    assert sum(chain.profile((0.8,) * num_models, 0.2).rates.values()) > 0


@pytest.mark.parametrize("weights", list(product((0.0, 1.0), repeat=3))[1:])
@pytest.mark.parametrize(
    "gamma", [(0, 16, 16), (0, 32, 32), (16, 4, 4), (32, 4, 4), (24, 24, 24), (1, 32, 1)]
)
def test_long_proposals_of_three_models_have_profiles_too(
    weights: tuple[float, ...], gamma: tuple[int, ...]
) -> None:
    """Whichever of them score, which clients choose. With many states runs are left out."""
    decoding = make_decoding("cos", Combination.linear(weights), gamma)
    strategy = Strategies(SharedCoins(0)).make(decoding)
    chain = Chain(decoding, strategy, has_forced=True)
    profile = chain.profile((0.8, 0.7, 0.9), 0.2)
    assert sum(profile.rates.values()) > 0
    if gamma == (0, 32, 32) and weights == (0.0, 1.0, 1.0):
        assert profile.rates == Chain(decoding, strategy).profile((0.8, 0.7, 0.9)).rates


def test_runs_end_drafts_and_follow_windows() -> None:
    """Where they follow every token, a draft has one, and all that is proposed opens a window."""
    decoding = make_decoding("cos", CONTRASTIVE, (8, 1))
    known = Strategies(SharedCoins(0)).make(decoding)
    always = Chain(decoding, known, has_forced=True).profile((0.8, 0.9), 1.0)
    assert max(shape.num_verified for shape in always.rates) > 1, "no rule of the strategy"
    windows = {shape: rate for shape, rate in always.rates.items() if shape.num_verified}
    lengths = sum(rate * shape.num_verified for shape, rate in windows.items())
    assert lengths / sum(windows.values()) == pytest.approx(1, abs=0.05)
    # What is accepted ends a window, and a run follows; what is not accepted needs no draw.
    assert always.num_forced == pytest.approx(0.8, abs=0.05)
    assert sum(shape.num_drawn * rate for shape, rate in always.rates.items()) < 0.05

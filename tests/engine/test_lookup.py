"""Prompt lookup: the law stays, fixed texts stay, and where a text repeats it saves forwards.

Comparisons and their limit are those of `test_exactness`.
"""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, LookupParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.engine import guesser
from server.engine.choices import make_choices
from server.engine.cost_table import CostTable, Timings
from server.engine.distributions import Distributions
from server.engine.engine import Engine
from server.engine.lookup_costs import LookupCosts
from tests.engine.test_controller import auto, capricious, controller, make_costs
from tests.engine.test_exactness import (
    COMBINATIONS,
    WARPS,
    decoding_of,
)
from tests.engine.test_grammar import (
    EOS,
    GRAMMARS,
    PATTERN,
    PROMPT as LETTERS,
    exact_law as exact_law_of_grammar,
)
from tests.support.engines import decode, generated, make_decoding, make_engine, run
from tests.support.exact import WRONG_LAW, Z_LIMIT, chi_square_z, exact_law
from tests.support.table_lm import TableLM

NUM_SAMPLES = 1000
PROMPT = [0, 2, 1, 0, 2, 2, 1]  # after any token, something is found
LOOKUP = LookupParams(max_ngram=3, min_ngram=1, max_tokens=3)
WEIGHTED, CONTRASTIVE = COMBINATIONS["weighted-2"], COMBINATIONS["contrastive-2"]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is found is proposed, however often that was wrong."""
    monkeypatch.setattr(guesser, "_MIN_RATE", 0.0)


def with_lookup(decoding: DecodingParams, lookup: LookupParams = LOOKUP) -> DecodingParams:
    return replace(decoding, lookup=lookup)


def check_law(
    decoding: DecodingParams,
    warp: dict[str, Any] | None = None,
    eos: frozenset[int] = frozenset(),
    lms: list[TableLM] | None = None,
    engine: Engine | None = None,
) -> None:
    lms = lms or [TableLM(seed=11 + k) for k in range(len(decoding.gamma))]
    options = {"max_tokens": 4, **(warp or {})}
    params = [SamplingParams(**options, seed=seed) for seed in range(NUM_SAMPLES)]
    engine = engine or make_engine(lms, eos=eos, max_sequences=500, max_step_tokens=4096)
    steps: list[StepStats] = []
    engine.observer.on_step = steps.append
    samples = decode(engine, PROMPT, params, decoding)
    law = exact_law(lms, decoding.combination, params[0], PROMPT, eos)
    assert chi_square_z(samples, law) < Z_LIMIT
    verdicts = [ok for step in steps for k, _, ok in step.verified_by_offset if k == -1]
    assert 50 < sum(verdicts) < len(verdicts) - 50, "some are accepted, some rejected"
    assert sum(step.num_looked_up for step in steps) >= len(verdicts)
    engine.scheduler.check_integrity()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("weighted-2", "standard"),
        ("weighted-2", "cos-each-2"),
        ("contrastive-2", "speculative-3"),
        ("linear-3", "standard"),
        ("linear-3", "cos-3"),
    ],
)
def test_law_beside_every_strategy(name: str, schedule: str) -> None:
    check_law(with_lookup(decoding_of(schedule, COMBINATIONS[name])))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("schedule", "verification"), [("standard", "token"), ("cos-3", "block")])
def test_law_of_long_guesses(schedule: str, verification: str) -> None:
    lms = [TableLM(seed=51 + k, spread=2.0) for k in range(2)]
    decoding = with_lookup(decoding_of(schedule, CONTRASTIVE), LookupParams(4, 2, 5))
    check_law(replace(decoding, verification=verification), {"max_tokens": 5}, lms=lms)  # type: ignore[arg-type]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("warp", ["top-k", "penalties", "allowed", "bad-words"])
def test_law_under_warps(warp: str) -> None:
    check_law(with_lookup(decoding_of("cos-3", WEIGHTED)), dict(WARPS[warp]))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("schedule", ["standard", "cos-each-2"])
def test_law_with_end_of_text(schedule: str) -> None:
    check_law(with_lookup(decoding_of(schedule, CONTRASTIVE)), eos=frozenset({1}))


@pytest.mark.usefixtures("eager")
def test_law_with_zeros_in_the_target() -> None:
    lms = [TableLM(seed=11 + k, zero_share=0.4) for k in range(2)]
    check_law(with_lookup(decoding_of("cos-3", WEIGHTED)), lms=lms)


@pytest.mark.parametrize("schedule", ["standard", "cos-3"])
def test_law_where_it_goes_by_how_often_it_was_right(schedule: str) -> None:
    check_law(with_lookup(decoding_of(schedule, WEIGHTED)), {"max_tokens": 6})


@pytest.mark.parametrize("by_history", [False, True])
def test_law_under_arbitrary_choices(by_history: bool) -> None:
    lms = [TableLM(seed=11 + k) for k in range(2)]
    decoding = with_lookup(auto(WEIGHTED, mixture=not by_history))
    engine, _ = capricious(lms, decoding, by_history)
    check_law(decoding, lms=lms, engine=engine)


def test_law_under_the_real_controller() -> None:
    lms = [TableLM(seed=11 + k) for k in range(2)]
    engine = make_engine(lms, max_sequences=64)
    engine.control(make_costs((0.1, 0.001, 0.0), (0.1, 0.001, 0.0)))
    check_law(with_lookup(auto(CONTRASTIVE)), lms=lms, engine=engine)


def test_a_wrong_proposal_law_is_noticed(monkeypatch: pytest.MonkeyPatch, eager: None) -> None:
    """As if guesses had been drawn evenly from the vocabulary."""

    def even(self: Distributions, token_ids: list[int]) -> Tensor:
        return torch.full((len(token_ids), 3), 1 / 3)

    monkeypatch.setattr(Distributions, "_one_hot", even)
    lms = [TableLM(seed=11 + k) for k in range(2)]
    engine = make_engine(lms, max_sequences=500, max_step_tokens=4096, cpu_kernels="off")
    with pytest.raises(AssertionError, match=WRONG_LAW):
        check_law(with_lookup(decoding_of("standard", WEIGHTED)), lms=lms, engine=engine)


@pytest.mark.usefixtures("eager")
def test_law_of_texts_that_follow_a_grammar() -> None:
    lms = [TableLM(seed=51 + k, vocab_size=5) for k in range(2)]
    decoding = with_lookup(decoding_of("cos-3", WEIGHTED), LookupParams(2, 1, 4))
    params = [SamplingParams(max_tokens=4, seed=seed) for seed in range(NUM_SAMPLES)]
    sequences = [
        Sequence.start(f"s{i}", LETTERS, each, decoding, matcher=matcher)
        for i, (each, matcher) in enumerate(
            zip(params, GRAMMARS.matchers("regex", PATTERN, len(params)), strict=True)
        )
    ]
    engine = make_engine(lms, eos=frozenset({EOS}), max_sequences=500, max_step_tokens=4096)
    deltas = run(engine, sequences)
    assert not any(delta.error for each in deltas.values() for delta in each)
    samples = [generated(deltas[sequence.id]) for sequence in sequences]
    assert chi_square_z(samples, exact_law_of_grammar(lms, WEIGHTED, params[0])) < Z_LIMIT
    assert sum(s.stats.num_lookup_accepted for s in sequences) > 100


def texts(
    decoding: DecodingParams, params: Row[SamplingParams], eos: frozenset[int] = frozenset()
) -> list[tuple[tuple[int, ...], str, Any]]:
    """Tokens, text and reason of the end of each."""
    lms = [TableLM(seed=40 + k, vocab_size=4, spread=2.0) for k in range(len(decoding.gamma))]
    sequences = [Sequence.start(f"s{i}", PROMPT, p, decoding) for i, p in enumerate(params)]
    deltas = run(make_engine(lms, eos=eos), sequences)
    if decoding.lookup is not None:
        accepted = sum(s.stats.num_lookup_accepted for s in sequences)
        assert 0 < accepted < sum(s.stats.num_looked_up for s in sequences)
    return [
        (generated(each), "".join(delta.text for delta in each), each[-1].finish_reason)
        for each in deltas.values()
    ]


FIXED = {
    "plain": {},
    "penalties": WARPS["penalties"],
    "min-tokens": {"min_tokens": 6},
    "stop-string": {"stop": ("2 1", "0 3", "3 3")},
    "stop-token": {"stop_token_ids": frozenset({2})},
    "logprobs": {"logprobs": 2},
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", [{"temperature": 0.0}, {"is_seeded": True}])
@pytest.mark.parametrize("name", ["weighted-2", "contrastive-3"])
def test_fixed_texts_are_those_of_standard(name: str, kind: dict[str, Any]) -> None:
    """Greedy or seeded: token for token, their ends and what is stopped included."""
    combination = COMBINATIONS[name]
    params = [
        SamplingParams(max_tokens=20 + i, seed=seed, **kind, **options)
        for i, options in enumerate(FIXED.values())
        for seed in range(2)
    ]
    for eos in (frozenset[int](), frozenset({3})):
        plain = texts(decoding_of("standard", combination), params, eos)
        for schedule in ("standard", "cos-each-2"):
            decoding = with_lookup(decoding_of(schedule, combination), LookupParams(3, 1, 6))
            assert texts(decoding, params, eos) == plain
        assert "stop" in {reason for _, _, reason in plain}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("schedule", ["standard", "cos-3"])
def test_batch_and_preemption_change_nothing(schedule: str) -> None:
    lms = [TableLM(seed=40 + k, vocab_size=4, spread=2.0) for k in range(2)]
    decoding = with_lookup(decoding_of(schedule, WEIGHTED), LookupParams(3, 1, 5))
    params = [SamplingParams(max_tokens=5 + seed, seed=seed) for seed in range(16)]
    alone = [decode(make_engine(lms), PROMPT, [each], decoding)[0] for each in params]
    preempted: list[int] = []
    engine = make_engine(
        lms,
        num_pages=24,
        max_step_tokens=11,
        on_step=lambda stats: preempted.append(stats.num_preempted),
    )
    assert decode(engine, PROMPT, params, decoding, engine.scheduler.check_integrity) == alone
    assert sum(preempted) > 0


class Cycle(TableLM):
    """Nearly always the next of ten tokens, round and round."""

    def __init__(self, doubt: float) -> None:
        super().__init__(seed=0, vocab_size=10)
        self._doubt = doubt

    def logits(self, prefix: Row[int]) -> np.ndarray:
        row = np.full(10, np.log(self._doubt / 9))
        row[(prefix[-1] + 1) % 10] = np.log(1 - self._doubt)
        return row


@pytest.mark.parametrize("schedule", ["standard", "cos-3"])
def test_a_text_that_repeats_takes_fewer_forwards(schedule: str) -> None:
    lms: list[TableLM] = [Cycle(0.02), Cycle(0.05)]
    plain = decoding_of(schedule, WEIGHTED)
    stats = []
    for decoding in (plain, with_lookup(plain, LookupParams(4, 2, 8))):
        prompt = list(range(10)) * 2
        sequence = Sequence.start("s", prompt, SamplingParams(max_tokens=40), decoding)
        run(make_engine(lms), [sequence])
        stats.append(sequence.stats)
    without, found = stats
    assert without.num_looked_up == 0
    assert found.num_lookup_accepted > 25
    assert found.num_recovered > 0, "some are wrong"
    assert sum(found.forwards) < sum(without.forwards) / 2
    made = sum(found.accepted) + found.num_lookup_accepted + found.num_recovered + found.num_drawn
    assert made - found.num_discarded == 40


def test_a_text_whose_guesses_are_wrong_is_left_alone() -> None:
    lms = [TableLM(seed=k, vocab_size=6) for k in range(2)]  # what came before says nothing
    steps: list[StepStats] = []
    decoding = with_lookup(decoding_of("standard", WEIGHTED))
    params = [SamplingParams(max_tokens=50, seed=seed) for seed in range(4)]
    decode(make_engine(lms, on_step=steps.append), PROMPT, params, decoding)
    asked = [outcome for step in steps for outcome in step.lookups]
    assert asked.count("withheld") > 4 * asked.count("proposed") > 0


def test_all_that_is_asked_is_counted() -> None:
    steps: list[StepStats] = []
    sequence = Sequence.start(
        "s",
        [1, 2, 3],
        SamplingParams(max_tokens=40),
        with_lookup(make_decoding("standard", WEIGHTED)),
    )
    engine = make_engine([Cycle(0.02), Cycle(0.02)], on_step=steps.append)
    run(engine, [sequence])
    asked = [outcome for step in steps for outcome in step.lookups]
    assert asked.count("missed") >= 6, "until a token comes again"
    assert asked.count("proposed") == sum(bool(step.num_looked_up) for step in steps) > 0
    assert sum(step.num_looked_up for step in steps) == sequence.stats.num_looked_up
    verdicts = [ok for step in steps for _, _, ok in step.verified_by_offset]
    assert sum(verdicts) == sequence.stats.num_lookup_accepted
    assert sum(step.num_proposed for step in steps) == 0
    assert sequence.stats.verified == [0, 0], "no model's"


@pytest.mark.parametrize("strategy", ["standard", "single"])
def test_provenance_names_it(strategy: str) -> None:
    combination = WEIGHTED if strategy == "standard" else Combination.only(2, 1)
    decoding = with_lookup(make_decoding(strategy, combination))
    params = SamplingParams(max_tokens=30, provenance=True)
    deltas = run(
        make_engine([Cycle(0.05), Cycle(0.05)]),
        [Sequence.start("s", list(range(10)) * 2, params, decoding)],
    )["s"]
    entries = [entry for delta in deltas for entry in delta.provenance]
    assert len(entries) == 30
    assert {(e.model, e.outcome) for e in entries} >= {(-1, "accepted"), (None, "drawn")}


def test_windows_of_standard_decoding_propose_nothing() -> None:
    steps: list[StepStats] = []
    engine = make_engine([Cycle(0.02), Cycle(0.02)], on_step=steps.append)
    engine.measure_standard(every_seconds=1e-9, rounds=4)
    decoding = with_lookup(make_decoding("standard", WEIGHTED))
    params = [SamplingParams(max_tokens=50, seed=seed) for seed in range(2)]
    decode(engine, list(range(10)), params, decoding)
    outcomes = [step.shadow.outcome for step in steps if step.shadow is not None]
    assert "measured" in outcomes
    assert sum(step.num_looked_up for step in steps) > 0
    assert not any(step.tails for step in steps if step.shadow and step.shadow.standard_tokens)


def test_lengths_by_what_they_take() -> None:
    dear = LookupCosts(token_seconds=1.0, cycle_seconds=(2.0, 4.0, 8.0))
    assert dear.best_length(0.99, 3) == 0
    flat = LookupCosts(token_seconds=1.0, cycle_seconds=(1.2, 1.2, 1.2, 1.2))
    assert flat.best_length(0.9, 4) == 4
    assert flat.best_length(0.9, 2) == 2
    assert flat.best_length(0.1, 4) == 0
    assert flat.best_length(0.9, 0) == 0
    rising = LookupCosts(token_seconds=1.0, cycle_seconds=(1.2, 1.5, 2.0, 4.0))
    assert rising.best_length(0.9, 4) == 2
    assert rising.best_length(0.5, 4) == 1


def test_a_cycle_of_lookup_is_priced_with_all_that_it_decides() -> None:
    """Of a batch of four: both models score, and one of them also decides, and draws one more."""
    feeds, draws, forwards = (0.01, 0.04), (0.03, 0.12), ((0.1, 0.1), (0.2, 0.2))
    costs = CostTable(Timings((1, 4), forwards, feeds, draws, num_scorers=2))
    found = LookupCosts.at(costs, (0, 1), 4, 2, token_seconds=1.0)
    feed, row = 0.04, (0.12 - 0.04) / 4
    # What is verified takes half as long again as what is drawn, until steps tell.
    expected = [(0.1 + 0.2 + 2 * feed + row * 4 * (1 + 1.5 * n)) / 4 for n in (1, 2)]
    assert found.cycle_seconds == pytest.approx(expected)


@pytest.mark.parametrize(("token", "expected"), [(0.0, 8), (9.0, 0)])
def test_auto_looks_up_where_that_pays(token: float, expected: int) -> None:
    """Where each token more costs as much as a forward, nothing more is scored than must be."""
    subject = controller(make_costs((0.1, 0.001, token), (0.1, 0.001, token)))
    decoding = with_lookup(auto(CONTRASTIVE), LookupParams(4, 2, 8))
    sequence = Sequence.start("s", [1], SamplingParams(), decoding)
    sequence.schedule = subject.choose(sequence)
    assert subject.lookup_length(sequence, 0.95, 8) == expected
    assert subject.lookup_length(sequence, 0.05, 8) == 0
    plain = Sequence.start("p", [1], SamplingParams(), auto(CONTRASTIVE))
    subject.choose(plain)
    assert subject.lookup_length(plain, 0.95, 8) == 0


def test_auto_copies_faster_than_it_decodes() -> None:
    costs = make_costs((0.02, 0.001, 0.001), (0.1, 0.001, 0.001))
    params = SamplingParams(max_tokens=40)
    forwards = []
    for lookup in (None, LookupParams(4, 2, 8)):
        engine = make_engine([Cycle(0.5), Cycle(0.02)])
        engine.control(costs)
        decoding = replace(auto(Combination.weighted([0.0, 1.0])), lookup=lookup)
        sequence = Sequence.start("s", list(range(10)) * 2, params, decoding)
        run(engine, [sequence])
        forwards.append(sequence.stats.forwards[1])
    assert forwards[1] < forwards[0] / 2


def test_mixtures_look_nothing_up() -> None:
    decoding = with_lookup(auto(WEIGHTED, mixture=True))
    chosen = [choice for choice in make_choices(decoding, 4) if choice.strategy == "mixture"]
    assert [choice.lookup for choice in chosen] == [None]

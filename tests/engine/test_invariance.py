"""A request's tokens do not depend on its batch, on preemption, on page size or on chunking."""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
import pytest

from server.core.combination import Combination
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from tests.support.engines import decode, generated, make_decoding, make_engine, run
from tests.support.exact import softmax, target
from tests.support.table_lm import DigitDecoder, TableLM, TableRunner

WEIGHTED = Combination.weighted([0.4, 0.6])
DECODINGS = {
    "standard": make_decoding("standard", WEIGHTED),
    "speculative": make_decoding("speculative", WEIGHTED, gamma=4),
    "cos": make_decoding("cos", WEIGHTED, gamma=(3, 2)),
    "contrastive": make_decoding("cos", Combination.contrastive(2, 0.3), gamma=3),
    "three": make_decoding("cos", Combination.weighted([0.3, 0.3, 0.4]), gamma=(3, 2, 1)),
    "mixture": make_decoding("mixture", WEIGHTED, gamma=4, kappa=2),
}


def make_lms(num_models: int) -> list[TableLM]:
    return [TableLM(seed=70 + k, vocab_size=20) for k in range(num_models)]


def make_sequences(decoding_name: str, count: int) -> list[Sequence]:
    rng = random.Random(3)
    decoding = DECODINGS[decoding_name]
    return [
        Sequence.start(
            f"s{i}",
            [rng.randrange(20) for _ in range(rng.randrange(1, 20))],
            SamplingParams(max_tokens=rng.randrange(1, 25), seed=i),
            decoding,
        )
        for i in range(count)
    ]


@cache
def run_alone(decoding_name: str, count: int) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """Texts, and forwards that decoded them by model."""
    num_models = len(DECODINGS[decoding_name].gamma)
    texts, forwards = [], []
    for sequence in make_sequences(decoding_name, count):
        deltas = run(make_engine(make_lms(num_models)), [sequence])
        texts.append(generated(deltas[sequence.id]))
        forwards.append(sequence.stats.forwards)
    return texts, forwards


@pytest.mark.parametrize("name", DECODINGS)
def test_batch_chunking_and_preemption_change_nothing(name: str) -> None:
    alone, forwards = run_alone(name, 16)
    preempted: list[int] = []

    def observe(stats: StepStats) -> None:
        preempted.append(stats.num_preempted)

    # 24 pages of 4 tokens hold two or three of the 16 sequences; a step feeds 11 tokens.
    engine = make_engine(
        make_lms(len(DECODINGS[name].gamma)), num_pages=24, max_step_tokens=11, on_step=observe
    )
    sequences = make_sequences(name, 16)
    deltas = run(engine, sequences, engine.scheduler.check_integrity)
    assert [generated(deltas[s.id]) for s in sequences] == alone
    if name != "mixture":  # which reads prompts in steps that decode
        assert [s.stats.forwards for s in sequences] == forwards, "no recomputation is decoding"
    assert sum(preempted) > 0
    assert sum(s.stats.num_preemptions for s in sequences) == sum(preempted)


def test_the_youngest_may_preempt_itself_while_others_want_another_model() -> None:
    """So few pages that a plan would be empty without a second look."""
    for num_pages in range(17, 23):
        engine = make_engine(make_lms(2), num_pages=num_pages, max_step_tokens=11)
        sequences = make_sequences("cos", 16)
        deltas = run(engine, sequences, engine.scheduler.check_integrity)
        assert all(deltas[s.id][-1].finish_reason == "length" for s in sequences)
        assert sum(s.stats.num_preemptions for s in sequences) > 0


def test_the_youngest_make_room_and_come_back_first() -> None:
    """So whoever runs came before all that wait, those that were preempted among them."""
    engine = make_engine(make_lms(2), num_pages=24, max_step_tokens=11)
    sequences = make_sequences("cos", 16)
    came = {sequence: place for place, sequence in enumerate(sequences)}
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        engine.step()
        running, waiting = engine.scheduler.running, engine.scheduler.waiting
        order = [came[sequence] for sequence in (*running, *waiting)]
        assert order == sorted(order)
    assert sum(sequence.stats.num_preemptions for sequence in sequences) > 0


def test_who_was_preempted_goes_on_with_the_same_coins() -> None:
    """To take others where values are known would be a choice by them."""
    decoding = make_decoding("mixture", WEIGHTED, gamma=4, kappa=1, shared_coins=True)
    engine = make_engine(make_lms(2))
    _, victim = sequences = [
        Sequence.start(f"s{i}", [i], SamplingParams(max_tokens=40, seed=i), decoding)
        for i in range(2)
    ]
    for sequence in sequences:
        engine.add(sequence)
    engine.step()
    while engine._strategies.shared_coins.is_fresh(victim) or not victim.num_generated:
        engine.step()
    before = victim.coin_base
    engine.scheduler._preempt(victim)
    engine.step()
    assert victim in engine.scheduler.running
    assert victim.coin_base == before
    assert victim.is_resuming


@pytest.mark.parametrize("name", DECODINGS)
def test_a_wide_batch_changes_nothing(name: str) -> None:
    engine = make_engine(make_lms(len(DECODINGS[name].gamma)))
    sequences = make_sequences(name, 16)
    deltas = run(engine, sequences, engine.scheduler.check_integrity)
    assert [generated(deltas[s.id]) for s in sequences] == run_alone(name, 16)[0]


@pytest.mark.parametrize("name", ["cos", "three"])
def test_random_aborts_leave_nothing_behind(name: str) -> None:
    rng = random.Random(8)
    engine = make_engine(make_lms(len(DECODINGS[name].gamma)), num_pages=60, max_sequences=7)
    sequences = make_sequences(name, 40)
    for sequence in sequences:
        engine.add(sequence)
    alive = {sequence.id for sequence in sequences}
    while engine.has_work:
        for delta in engine.step():
            assert delta.sequence_id in alive
        engine.scheduler.check_integrity()
        if alive and rng.random() < 0.3:
            victim = rng.choice(sorted(alive))
            engine.abort(victim)
            alive.discard(victim)
            engine.scheduler.check_integrity()
    assert engine.scheduler.pages.num_used() == (0,) * engine.num_models


@pytest.mark.parametrize("combination", [WEIGHTED, Combination.contrastive(2, 0.3, 0.05)])
def test_logprobs_are_those_of_the_combined_law_whatever_the_strategy(
    combination: Combination,
) -> None:
    """Before temperature and truncation, for drawn, accepted and recovered tokens alike."""
    lms = make_lms(2)
    params = SamplingParams(max_tokens=20, seed=4, logprobs=3, temperature=0.7, top_k=12)
    kinds = set()
    for strategy in ("standard", "speculative", "cos"):
        sequence = Sequence.start("s", [1, 2], params, make_decoding(strategy, combination))
        deltas = run(make_engine(lms), [sequence])["s"]
        kinds |= {name for name in ("num_recovered", "num_drawn") if getattr(sequence.stats, name)}
        made = generated(deltas)
        entries = [entry for delta in deltas for entry in delta.logprobs]
        assert [entry.token_id for entry in entries] == list(made)
        for i, entry in enumerate(entries):
            r = target(lms, combination, SamplingParams(), [1, 2], made[:i])
            assert entry.logprob == pytest.approx(math.log(r[entry.token_id]), abs=1e-5)
            best = np.argsort(-r)[:3]
            assert [token for token, _ in entry.top] == best.tolist()
            assert [p for _, p in entry.top] == pytest.approx(np.log(r[best]).tolist(), abs=1e-5)
    assert kinds == {"num_recovered", "num_drawn"}


def test_strategies_save_forwards_where_models_agree() -> None:
    """Two equal models: cos needs one forward a token where standard needs two."""
    lms = [TableLM(seed=1, vocab_size=20), TableLM(seed=1, vocab_size=20)]
    params = [SamplingParams(max_tokens=24, seed=1)]
    for strategy, most in (("standard", 2.0), ("cos", 1.4), ("mixture", 1.1)):
        runners = [TableRunner(lm) for lm in lms]
        engine = Engine(runners, DigitDecoder(), frozenset(), EngineLimits())
        decode(engine, [1], params, make_decoding(strategy, WEIGHTED, gamma=4))
        assert sum(r.num_forwards for r in runners) <= most * 24 + 2


def test_a_degenerate_combination_does_not_pay_for_the_other_model() -> None:
    for combination, idle in ((Combination.only(2, 1), 0), (Combination.only(2, 0), 1)):
        for strategy in ("standard", "cos", "speculative"):
            if strategy != "standard" and idle == 0:
                continue  # model 0 proposes, which is its use
            runners = [TableRunner(lm) for lm in make_lms(2)]
            engine = Engine(runners, DigitDecoder(), frozenset(), EngineLimits())
            decode(
                engine, [1], [SamplingParams(max_tokens=9)], make_decoding(strategy, combination)
            )
            assert runners[idle].num_forwards == 0


def test_nobody_starves_beside_one_that_always_wants_model_0() -> None:
    engine = make_engine(make_lms(2))
    only_first = make_decoding("single", Combination.only(2, 0))
    only_last = make_decoding("single", Combination.only(2, 1))
    busy = Sequence.start("busy", [1], SamplingParams(max_tokens=60), only_first)
    other = Sequence.start("other", [1], SamplingParams(max_tokens=2), only_last)
    engine.add(busy)
    engine.add(other)
    while not other.is_finished:
        engine.step()
    assert not busy.is_finished


def test_a_broken_distribution_fails_its_own_sequence_only() -> None:
    class Broken(TableLM):
        def logits(self, prefix):
            row = super().logits(prefix)
            return row * math.nan if 13 in prefix else row

    lms = [TableLM(seed=1, vocab_size=20), Broken(seed=2, vocab_size=20)]
    for strategy in ("standard", "cos", "speculative", "mixture"):
        engine = make_engine(lms)
        decoding = make_decoding(strategy, WEIGHTED, gamma=3, kappa=1)
        params = SamplingParams(max_tokens=6, logit_bias=((13, -100.0),))
        bad = Sequence.start("bad", [13, 1], params, decoding)
        good = Sequence.start("good", [1, 1], params, decoding)
        deltas = run(engine, [bad, good])
        assert deltas["bad"][-1].finish_reason == "error"
        assert "NaN" in (deltas["bad"][-1].error or "")
        assert deltas["good"][-1].finish_reason == "length"
        assert engine.scheduler.pages.num_used() == (0, 0)


def test_contradicting_supports_fail_clearly() -> None:
    """A product of experts without a common token has no law."""
    lms = [TableLM(seed=k, vocab_size=2, zero_share=1.0) for k in (1, 2)]
    rows = [softmax(lm.logits([0])) for lm in lms]
    assert rows[0] @ rows[1] == 0
    decoding = make_decoding("cos", Combination.linear([1.0, 1.0]))
    for temperature in (1.0, 0.0):
        sequence = Sequence.start("s", [0], SamplingParams(temperature=temperature), decoding)
        deltas = run(make_engine(lms), [sequence])
        assert deltas["s"][-1].finish_reason == "error"

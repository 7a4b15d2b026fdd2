"""Log-probabilities of prompts: the combined law's, in windows, whatever else is running."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from server.core.combination import Combination
from server.core.output import TokenDelta
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from tests.support.engines import generated, make_decoding, make_engine, run
from tests.support.exact import target
from tests.support.table_lm import TableLM

VOCAB_SIZE = 20
COMBINATIONS = {
    "weighted": Combination.weighted([0.4, 0.6]),
    "contrastive": Combination.contrastive(2, 0.3, plausibility=0.05),
    "last-only": Combination.weighted([0.0, 1.0]),
    "three": Combination.linear([0.3, 0.5, 0.4]),
}


def make_lms(num_models: int) -> list[TableLM]:
    return [TableLM(seed=90 + k, vocab_size=VOCAB_SIZE) for k in range(num_models)]


def make_sequences(
    strategy: str, combination: Combination, count: int, num_top: int = 3, max_tokens: int = 9
) -> list[Sequence]:
    """Prompts of 1 to 50 tokens; every third asks for nothing of the prompt."""
    rng = random.Random(3)
    decoding = make_decoding(strategy, combination, kappa=1)
    sequences = []
    for i in range(count):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(20, 50) if i else 1)]
        wanted = None if i % 3 == 2 else num_top
        params = SamplingParams(
            max_tokens=max_tokens or (wanted is None), seed=i, prompt_logprobs=wanted, top_k=4
        )
        sequences.append(Sequence.start(f"s{i}", prompt, params, decoding))
    return sequences


def check(lms: list[TableLM], sequence: Sequence, prompt: list[int], deltas: list[TokenDelta]):
    entries = [entry for delta in deltas for entry in delta.prompt_logprobs]
    num_top = sequence.params.prompt_logprobs
    if num_top is None:
        assert entries == []
        return
    assert list(deltas[0].prompt_logprobs) == entries
    assert [entry.token_id for entry in entries] == prompt[1:]
    for i, entry in enumerate(entries, start=1):
        r = target(lms, sequence.decoding.combination, SamplingParams(), prompt[:i], [])
        with np.errstate(divide="ignore"):
            expected = np.log(r)
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-5)
        assert entry.rank == 1 + int((r > r[entry.token_id] * (1 + 1e-6)).sum())
        best = np.argsort(-r)[:num_top]
        assert [token for token, _ in entry.top] == best.tolist()
        assert [p for _, p in entry.top] == pytest.approx(expected[best].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("weighted", "standard"), ("weighted", "mixture"), *((name, "cos") for name in COMBINATIONS)],
)
def test_prompts_have_the_combined_log_probabilities(name: str, strategy: str) -> None:
    """In windows of 16 positions for one sequence at a time and 10 or 11 for the others."""
    combination = COMBINATIONS[name]
    lms = make_lms(len(combination.weights))
    alone = []
    for sequence in make_sequences(strategy, combination, 9):
        if strategy != "mixture":  # whose windows begin at the prompt's end if it is scored
            sequence.num_scored = sequence.num_prompt  # as if it had not asked
        alone.append(generated(run(make_engine(lms), [sequence])[sequence.id]))
    for num_pages, max_step_tokens in ((4096, 16), (19, 13)):
        steps: list[StepStats] = []
        engine = make_engine(
            lms, num_pages=num_pages, max_step_tokens=max_step_tokens, on_step=steps.append
        )
        sequences = make_sequences(strategy, combination, 9)
        prompts = [list(sequence.token_ids) for sequence in sequences]
        deltas = run(engine, sequences, engine.scheduler.check_integrity)
        for sequence, prompt in zip(sequences, prompts, strict=True):
            check(lms, sequence, prompt, deltas[sequence.id])
        assert [generated(deltas[sequence.id]) for sequence in sequences] == alone
        assert all(step.num_tokens <= max_step_tokens for step in steps)
        assert (sum(step.num_preempted for step in steps) > 0) == (num_pages == 19)


@pytest.mark.parametrize("strategy", ["standard", "cos"])
def test_nothing_need_be_generated(strategy: str) -> None:
    lms = make_lms(2)
    engine = make_engine(lms)
    sequences = make_sequences(strategy, COMBINATIONS["weighted"], 6, max_tokens=0)
    prompts = [list(sequence.token_ids) for sequence in sequences]
    deltas = run(engine, sequences)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        check(lms, sequence, prompt, deltas[sequence.id])
        if sequence.params.max_tokens == 0:
            (delta,) = deltas[sequence.id]
            assert delta.finish_reason == "length"
            assert delta.token_ids == ()
            assert sequence.stats.proposed == [0, 0]
    engine.scheduler.check_integrity()
    assert engine.scheduler.pages.num_used() == (0, 0)


def test_an_abort_gives_the_wide_ring_back() -> None:
    engine = make_engine(make_lms(2), max_step_tokens=16)
    first, second = make_sequences("cos", COMBINATIONS["weighted"], 5)[3:]
    wide = []
    for sequence in (first, second):
        engine.add(sequence)
        engine.step()
        wide.append(sequence.prompt_slot)
        engine.abort(sequence.id)
        assert not engine.has_work
    assert wide[0] == wide[1] != -1


def test_the_wide_ring_is_one_sequences_at_a_time() -> None:
    """It is free once its prompt is scored, and not again when that sequence ends."""
    engine = make_engine(make_lms(2), max_step_tokens=16)
    decoding = make_decoding("cos", COMBINATIONS["weighted"])
    params = SamplingParams(max_tokens=9, prompt_logprobs=0)
    first, second, third = (Sequence.start(f"s{i}", [i] * 50, params, decoding) for i in range(3))
    engine.add(first)
    engine.step()
    wide = first.prompt_slot
    assert wide not in (-1, first.slot)
    while first.scores_prompt:
        engine.step()
    engine.add(second)
    engine.step()
    assert second.prompt_slot == wide
    engine.abort(first.id)
    engine.add(third)
    engine.step()
    assert third.prompt_slot == third.slot
    assert second.prompt_slot == wide


def test_a_broken_prompt_fails_its_own_sequence_only() -> None:
    class Broken(TableLM):
        def logits(self, prefix):
            row = super().logits(prefix)
            return row * math.nan if len(prefix) == 5 and prefix[0] == 13 else row

    lms = [TableLM(seed=1, vocab_size=20), Broken(seed=2, vocab_size=20)]
    decoding = make_decoding("cos", COMBINATIONS["weighted"])
    params = SamplingParams(max_tokens=2, prompt_logprobs=0)
    bad = Sequence.start("bad", [13] + [1] * 20, params, decoding)
    good = Sequence.start("good", [12] + [1] * 20, params, decoding)
    deltas = run(make_engine(lms), [bad, good])
    assert deltas["bad"][-1].finish_reason == "error"
    assert len(deltas["good"][0].prompt_logprobs) == 20
    assert deltas["good"][-1].finish_reason == "length"

"""Ends of texts, as clients see them."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import pytest

from server.core.combination import Combination
from server.core.output import TokenDelta
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from tests.support.engines import generated, make_decoding, make_engine, run
from tests.support.table_lm import TableLM

LMS = [TableLM(seed=1, vocab_size=20), TableLM(seed=1, vocab_size=20)]
STRATEGIES = ["standard", "speculative", "cos", "mixture"]


def decode(
    strategy: str, eos: Set[int] = frozenset(), **options: Any
) -> tuple[list[TokenDelta], Sequence]:
    decoding = make_decoding(strategy, Combination.weighted([0.5, 0.5]), gamma=6, kappa=2)
    params = SamplingParams(**{"max_tokens": 30, "seed": 3, **options})
    sequence = Sequence.start("s", [1], params, decoding)
    engine = make_engine(LMS, eos=frozenset(eos))
    deltas = run(engine, [sequence])["s"]
    engine.scheduler.check_integrity()
    assert sequence.is_finished
    return deltas, sequence


def text(deltas: list[TokenDelta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("max_tokens", [1, 2, 5, 30])
def test_max_tokens(strategy: str, max_tokens: int) -> None:
    deltas, sequence = decode(strategy, max_tokens=max_tokens)
    assert len(generated(deltas)) == max_tokens == sequence.num_generated
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].stats is sequence.stats


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_end_of_text_and_what_follows_it(strategy: str) -> None:
    free, _ = decode(strategy)
    tokens = generated(free)
    eos = tokens[7]
    cut = tokens.index(eos) + 1
    deltas, _ = decode(strategy, {eos})
    assert generated(deltas) == tokens[:cut]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", None)
    assert text(free).startswith(text(deltas))
    ignoring, _ = decode(strategy, {eos}, ignore_eos=True)
    assert generated(ignoring) == tokens
    by_id, _ = decode(strategy, stop_token_ids=frozenset({eos}))
    assert generated(by_id) == tokens[:cut]
    assert by_id[-1].stop_reason == eos
    included, _ = decode(strategy, {eos}, include_stop=True)
    assert text(free).startswith(text(included))
    assert len(text(included)) > len(text(deltas))


@pytest.mark.parametrize(
    ("strategy", "logprobs"),
    [*((name, None) for name in STRATEGIES), ("standard", 1), ("speculative", 1), ("cos", 1)],
)
def test_a_text_that_has_ended_needs_nothing_that_could_follow(
    strategy: str, logprobs: int | None
) -> None:
    """Whatever follows the stop token would complete a bad word; windows reach beyond it."""
    for seed in range(8):
        deltas, _ = decode(
            strategy,
            allowed_token_ids=(0, 3),
            stop_token_ids=frozenset({3}),
            bad_words=((3, 0), (3, 3)),
            seed=seed,
            logprobs=logprobs,
        )
        tokens = generated(deltas)
        assert tokens == (0,) * (len(tokens) - 1) + (3,)
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", 3)
        if logprobs is not None:
            reported = [entry.token_id for delta in deltas for entry in delta.logprobs or ()]
            assert tuple(reported) == tokens


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_was_decided_before_nothing_could_follow_is_told(strategy: str) -> None:
    """As by standard decoding, which has told of it by then."""
    for seed in range(4):
        deltas, _ = decode(
            strategy, allowed_token_ids=(0, 3), bad_words=((3, 0), (3, 3)), seed=seed
        )
        tokens = generated(deltas)
        assert tokens == (0,) * (len(tokens) - 1) + (3,) or tokens == (0,) * 30
        assert deltas[-1].finish_reason == ("length" if len(tokens) == 30 else "error")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stop_strings_across_multi_token_steps(strategy: str) -> None:
    free, _ = decode(strategy)
    whole = text(free)
    stop = whole[9:14]
    deltas, _ = decode(strategy, stop=(stop, "never"))
    assert text(deltas) == whole[: whole.index(stop)]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
    included, _ = decode(strategy, stop=(stop,), include_stop=True)
    assert text(included) == whole[: whole.index(stop) + len(stop)]
    assert generated(deltas) == generated(free)[: len(generated(deltas))]


def test_min_tokens_forbids_the_end_of_text() -> None:
    eos = generated(decode("cos")[0])[2]
    deltas, _ = decode("cos", {eos}, min_tokens=10)
    assert eos not in generated(deltas)[:10]


def test_counts_add_up() -> None:
    """Every verified token was accepted, recovered or drawn, delivered or discarded."""
    steps: list[StepStats] = []
    lms = [TableLM(seed=1, vocab_size=20), TableLM(seed=2, vocab_size=20)]
    engine = make_engine(lms, eos=frozenset({3}), on_step=steps.append)
    decoding = make_decoding("cos", Combination.weighted([0.5, 0.5]), gamma=(4, 2))
    sequences = [
        Sequence.start(f"s{i}", [1, 2], SamplingParams(max_tokens=25, seed=i), decoding)
        for i in range(12)
    ]
    deltas = run(engine, sequences)
    delivered = sum(len(generated(each)) for each in deltas.values())
    accepted = sum(ok for step in steps for _, _, ok in step.verified_by_offset)
    rejected = sum(not ok for step in steps for _, _, ok in step.verified_by_offset)
    recovered = sum(step.num_recovered for step in steps)
    drawn = sum(step.num_drawn for step in steps)
    discarded = sum(step.num_discarded for step in steps)
    assert rejected == recovered > 0
    assert accepted + recovered + drawn == delivered + discarded
    assert delivered == sum(step.num_generated for step in steps)
    assert sum(step.num_proposed for step in steps) == sum(sum(s.stats.proposed) for s in sequences)
    assert accepted == sum(sum(s.stats.accepted) for s in sequences)
    assert discarded == sum(s.stats.num_discarded for s in sequences)
    assert sum(step.num_bonus for step in steps) == sum(s.stats.num_bonus for s in sequences) > 0
    prefill = sum(step.num_prefill_tokens for step in steps)
    assert prefill == 12 * 2 * 2


def test_the_waiting_come_in_by_priority_then_as_they_came() -> None:
    engine = make_engine(LMS, max_sequences=1)
    decoding = make_decoding("cos", Combination.weighted([0.5, 0.5]), gamma=2)
    params = SamplingParams(max_tokens=4, seed=1)
    order = []
    for index, priority in enumerate((5, 0, -1, 0, 5, -1)):
        engine.add(Sequence.start(str(index), [1], params, decoding, priority))
    while engine.has_work:
        order += [d.sequence_id for d in engine.step() if d.finish_reason is not None]
        engine.scheduler.check_integrity()
    assert order == ["2", "5", "1", "3", "0", "4"]

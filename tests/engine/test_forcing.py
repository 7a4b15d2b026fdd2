"""Tokens that a grammar leaves no choice about: verified without scores, and the same text."""

from __future__ import annotations

from typing import Any

import pytest

from server.core.output import TokenDelta
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.engine import advance
from tests.engine.test_exactness import COMBINATIONS, MIXTURES, SCHEDULES, decoding_of
from tests.engine.test_grammar import EOS, GRAMMARS, PROMPT, TOKENS, make_lms
from tests.support.engines import generated, make_decoding, make_engine, run

# Choices at both ends, and a long way between them without any.
LITERAL = "ca" * 11
PATTERN = f"(b|c)+a{LITERAL}(a|c|b)+"
COS = make_decoding("cos", COMBINATIONS["weighted-2"], gamma=3)


def write(
    pattern: str, params: SamplingParams, decoding: Any = COS, **limits: Any
) -> tuple[list[TokenDelta], Sequence, list[StepStats]]:
    steps: list[StepStats] = []
    lms = make_lms(len(decoding.combination.weights))
    engine = make_engine(lms, eos=frozenset({EOS}), on_step=steps.append, **limits)
    [matcher] = GRAMMARS.matchers("regex", pattern, 1)
    sequence = Sequence.start("s", PROMPT, params, decoding, matcher=matcher)
    deltas = run(engine, [sequence])["s"]
    engine.scheduler.check_integrity()
    return deltas, sequence, steps


def spelt(deltas: list[TokenDelta]) -> str:
    return "".join(TOKENS[token] for token in generated(deltas))


@pytest.mark.parametrize("schedule", [each for each in SCHEDULES if each not in MIXTURES])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_the_same_and_take_fewer_forwards(
    monkeypatch: pytest.MonkeyPatch, schedule: str, temperature: float
) -> None:
    decoding = decoding_of(schedule, COMBINATIONS["weighted-2"])
    for seed in range(2):
        params = SamplingParams(max_tokens=60, seed=seed, temperature=temperature, is_seeded=True)
        with monkeypatch.context() as patch:
            patch.setattr(advance, "force", lambda *_: None)
            expected, _, slow = write(PATTERN, params, decoding)
        found, sequence, fast = write(PATTERN, params, decoding)
        assert generated(found) == generated(expected)
        assert found[-1].finish_reason == expected[-1].finish_reason
        assert sequence.stats.num_forced > 10
        assert len(fast) < len(slow)


def test_a_mixture_draws_every_token() -> None:
    decoding = decoding_of("kappa-2", COMBINATIONS["weighted-2"])
    deltas, sequence, _ = write(PATTERN, SamplingParams(max_tokens=40, seed=1), decoding)
    assert LITERAL in spelt(deltas)
    assert sequence.stats.num_forced == 0


def test_what_is_counted() -> None:
    params = SamplingParams(max_tokens=50, seed=3, provenance=True)
    deltas, sequence, steps = write(PATTERN, params)
    stats = sequence.stats
    outcomes = [entry.outcome for delta in deltas for entry in delta.provenance]
    assert len(outcomes) == len(generated(deltas))
    assert outcomes.count("forced") == stats.num_forced > 10
    decided = sum(stats.accepted) + stats.num_recovered + stats.num_drawn
    assert decided + stats.num_forced - stats.num_discarded == len(outcomes)
    assert sum(step.num_forced for step in steps) == stats.num_forced
    deliveries = [delivery for step in steps for delivery in step.deliveries]
    assert sum(delivery.num_forced for delivery in deliveries) == stats.num_forced
    assert sum(delivery.num_decoded for delivery in deliveries) == len(outcomes) - 1 - (
        stats.num_forced
    )


def test_a_window_ends_where_tokens_are_forced() -> None:
    """They are not drafted: once the window is verified they cost no forward."""
    deltas, sequence, _ = write("((a|b)cc){12}", SamplingParams(max_tokens=60, seed=1))
    assert len(spelt(deltas)) == 36
    assert 5 < sum(sequence.stats.proposed) <= 12
    assert sequence.stats.num_forced == 24


def test_a_long_way_is_taken_in_steps_of_bounded_length() -> None:
    params = SamplingParams(max_tokens=61, seed=1)
    deltas, _, steps = write("b" + "ca" * 30, params, max_gamma=5)
    assert spelt(deltas) == "b" + "ca" * 30
    assert deltas[-1].finish_reason == "stop"
    assert max(step.num_forced for step in steps) == 5
    assert max(step.num_tokens for step in steps) <= 5 + 2  # no longer than a window


def test_a_complete_text_ends_there() -> None:
    standard = decoding_of("standard", COMBINATIONS["weighted-2"])
    deltas, sequence, _ = write("b(ca)+cb", SamplingParams(max_tokens=60, seed=2), standard)
    assert spelt(deltas).endswith("cb")
    assert EOS not in generated(deltas)
    assert sequence.stats.num_discarded == 0


@pytest.mark.parametrize("max_tokens", [5, 12])
def test_max_tokens_holds(max_tokens: int) -> None:
    deltas, sequence, _ = write("b" + "ca" * 30, SamplingParams(max_tokens=max_tokens, seed=1))
    assert len(generated(deltas)) == max_tokens
    assert deltas[-1].finish_reason == "length"
    assert sequence.stats.num_discarded == 0


def test_a_forced_stop_token_ends_the_text() -> None:
    params = SamplingParams(max_tokens=40, seed=1, stop_token_ids=frozenset({TOKENS.index("b")}))
    deltas, _, _ = write("a(ca){4}b(ca){4}", params)
    assert spelt(deltas) == "a" + "ca" * 4 + "b"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", TOKENS.index("b"))


def test_log_probabilities_need_every_models_scores() -> None:
    params = SamplingParams(max_tokens=40, seed=1, logprobs=0)
    deltas, sequence, _ = write(PATTERN, params)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert len(entries) == len(generated(deltas))
    assert sequence.stats.num_forced == 0


def test_what_the_request_bans_is_not_forced() -> None:
    """Nothing is left then, and the request fails."""
    for bans in (
        {"bad_words": ((TOKENS.index("a"),),)},
        {"allowed_token_ids": (TOKENS.index("c"),)},
    ):
        params = SamplingParams(max_tokens=40, seed=1, **bans)
        deltas, _, _ = write("c(ca)+", params)
        assert deltas[-1].finish_reason == "error"


def test_nothing_is_forced_before_min_tokens() -> None:
    params = SamplingParams(max_tokens=40, min_tokens=8, seed=1)
    _, sequence, steps = write("b" + "ca" * 9, params)
    assert sequence.stats.num_forced == 19 - 8
    assert sum(step.num_forced for step in steps) == 19 - 8


def test_texts_of_a_batch_are_forced_each_by_itself() -> None:
    """Beside preemptions and small steps, and texts without a grammar."""
    params = [SamplingParams(max_tokens=40, seed=seed, is_seeded=True) for seed in range(9)]
    alone = [generated(write(PATTERN, each)[0]) for each in params]
    steps: list[StepStats] = []
    engine = make_engine(
        make_lms(2),
        eos=frozenset({EOS}),
        on_step=steps.append,
        num_pages=13,
        max_step_tokens=20,
    )
    matchers = GRAMMARS.matchers("regex", PATTERN, len(params))
    sequences = [
        Sequence.start(f"s{index}", PROMPT, each, COS, matcher=matcher)
        for index, (each, matcher) in enumerate(zip(params, matchers, strict=True))
    ]
    free = [
        Sequence.start(f"free{seed}", PROMPT, SamplingParams(max_tokens=30, seed=seed), COS)
        for seed in range(3)
    ]
    deltas = run(engine, [*sequences, *free])
    engine.scheduler.check_integrity()
    assert [generated(deltas[sequence.id]) for sequence in sequences] == alone
    assert sum(step.num_preempted for step in steps) > 0
    assert all(sequence.stats.num_forced == 0 for sequence in free)

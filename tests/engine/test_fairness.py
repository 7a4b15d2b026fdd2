"""A long prompt is read in pieces between the tokens of those who decode."""

from __future__ import annotations

import pytest

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from tests.support.engines import make_decoding
from tests.support.table_lm import DigitDecoder, TableLM, TableRunner

WEIGHTED = Combination.weighted([0.5, 0.5])
PIECE = 16
MAX_GAMMA = 4
NUM_SHORT = 4


def make_engine(steps: list[StepStats]) -> Engine:
    lms = [TableLM(seed=1, vocab_size=5), TableLM(seed=2, vocab_size=5)]
    limits = EngineLimits(max_step_tokens=512, max_prefill_tokens=PIECE, max_gamma=MAX_GAMMA)
    runners = [TableRunner(lm, max_length=1024) for lm in lms]
    return Engine(runners, DigitDecoder(), frozenset(), limits, on_step=steps.append)


@pytest.mark.parametrize("strategy", ["standard", "speculative", "cos", "mixture"])
def test_a_long_prompt_delays_no_token_for_long(strategy: str) -> None:
    """Between two tokens of a text lie few steps, and no step feeds more than its share."""
    steps: list[StepStats] = []
    engine = make_engine(steps)
    decoding = make_decoding(strategy, WEIGHTED, gamma=MAX_GAMMA, kappa=1)
    short = [
        Sequence.start(f"short-{i}", [i], SamplingParams(max_tokens=400, seed=i), decoding)
        for i in range(NUM_SHORT)
    ]
    for sequence in short:
        engine.add(sequence)
    for _ in range(20):
        engine.step()
    long = Sequence.start("long", [1, 2] * 300, SamplingParams(max_tokens=2), decoding)
    engine.add(long)
    steps.clear()
    last = {sequence.id: 0 for sequence in short}
    longest = 0
    while not long.is_finished:
        for delta in engine.step():
            if delta.sequence_id in last:
                longest = max(longest, len(steps) - last[delta.sequence_id])
                last[delta.sequence_id] = len(steps)
        # A prompt that is being read is no text that is being written.
        assert engine.scheduler.num_decoding == NUM_SHORT + (long.num_generated == 1)
    assert not any(sequence.is_finished for sequence in short)
    # A cycle proposes MAX_GAMMA tokens and scores them; the reader's own turns come between.
    assert longest <= 2 * (MAX_GAMMA + 2)
    fed = MAX_GAMMA + 2  # at most, of a decoding sequence
    assert max(step.num_tokens for step in steps) <= PIECE * fed + NUM_SHORT * fed
    assert len(steps) >= 600 // (PIECE * fed)


def tokens_meanwhile(strategy: str) -> int:
    """Tokens that a text gets while a long prompt is read; no proposal is rejected."""
    lms = [TableLM(seed=1, vocab_size=5)] * 2
    limits = EngineLimits(max_step_tokens=512, max_prefill_tokens=PIECE, max_gamma=MAX_GAMMA)
    runners = [TableRunner(lm, max_length=2048) for lm in lms]
    engine = Engine(runners, DigitDecoder(), frozenset(), limits)
    decoding = make_decoding(strategy, WEIGHTED, gamma=MAX_GAMMA)
    busy = Sequence.start("busy", [1], SamplingParams(max_tokens=1000, seed=1), decoding)
    engine.add(busy)
    for _ in range(20):
        engine.step()
    long = Sequence.start("long", [1, 2] * 500, SamplingParams(max_tokens=1), decoding)
    engine.add(long)
    before = busy.num_generated
    while not long.is_finished:
        engine.step()
    assert not busy.is_finished
    return busy.num_generated - before


@pytest.mark.parametrize("strategy", ["speculative", "cos", "mixture"])
def test_prompts_are_read_as_fast_beside_longer_cycles(strategy: str) -> None:
    """By the tokens that others get meanwhile, which are what a prompt delays."""
    assert tokens_meanwhile(strategy) <= 1.25 * tokens_meanwhile("standard")


def test_a_prompt_alone_takes_the_whole_step() -> None:
    steps: list[StepStats] = []
    engine = make_engine(steps)
    decoding = make_decoding("cos", WEIGHTED, gamma=2)
    engine.add(Sequence.start("long", [1, 2] * 256, SamplingParams(max_tokens=2), decoding))
    engine.step()
    assert steps[0].num_tokens == 512


def test_nobody_is_left_out_of_full_steps_for_long() -> None:
    """A step that has no room for all who decode takes those first that the last one left out."""
    lms = [TableLM(seed=1, vocab_size=5)] * 2
    limits = EngineLimits(max_step_tokens=MAX_GAMMA + 2, max_gamma=MAX_GAMMA)
    runners = [TableRunner(lm, max_length=1024) for lm in lms]
    engine = Engine(runners, DigitDecoder(), frozenset(), limits)
    decoding = make_decoding("cos", WEIGHTED, gamma=MAX_GAMMA)
    sequences = [
        Sequence.start(f"s{i}", [i], SamplingParams(max_tokens=300, seed=i), decoding)
        for i in range(3)
    ]
    for sequence in sequences:
        engine.add(sequence)
    while sequences[0].num_generated < 100:
        engine.step()
    assert min(sequence.num_generated for sequence in sequences) >= 60
    assert engine.scheduler._left_out
    for sequence in sequences:
        engine.abort(sequence.id)
    assert not engine.scheduler._left_out


def test_pieces_smaller_than_a_page_still_end() -> None:
    steps: list[StepStats] = []
    engine = make_engine(steps)
    engine.scheduler._max_prefill_tokens = 1
    decoding = make_decoding("cos", WEIGHTED, gamma=2)
    busy = Sequence.start("busy", [1], SamplingParams(max_tokens=300), decoding)
    late = Sequence.start("late", [1, 2] * 12, SamplingParams(max_tokens=1), decoding)
    engine.add(busy)
    engine.step()
    engine.step()
    engine.add(late)
    while not late.is_finished:
        engine.step()
    assert not busy.is_finished


def steps_of_reading(
    prompt: list[int], decoding: DecodingParams, busy: DecodingParams, num_busy: int = 1
) -> list[StepStats]:
    """From when a prompt comes, beside texts that are being written, to its first token."""
    steps: list[StepStats] = []
    engine = make_engine(steps)
    for i in range(num_busy):
        params = SamplingParams(max_tokens=400, seed=i)
        engine.add(Sequence.start(f"busy-{i}", [i], params, busy))
    for _ in range(20):
        engine.step()
    late = Sequence.start("late", prompt, SamplingParams(max_tokens=1), decoding)
    engine.add(late)
    steps.clear()
    while not late.is_finished:
        engine.step()
    return steps


def test_a_prompt_does_not_wait_for_a_model_that_only_it_needs() -> None:
    """Beside texts that another model writes alone, as beside texts that need both."""
    both, first = make_decoding("standard", WEIGHTED), Combination.only(2, 0)
    num_steps = [
        len(steps_of_reading([1, 2] * 48, both, busy, NUM_SHORT))
        for busy in (both, make_decoding("single", first))
    ]
    assert num_steps[1] <= 2 * num_steps[0]


@pytest.mark.parametrize("strategy", ["speculative", "cos"])
def test_a_prompt_is_read_in_steps_that_decode(strategy: str) -> None:
    """A cycle comes to every model soon: a step for prompts alone would delay it for nothing."""
    busy = make_decoding(strategy, WEIGHTED, gamma=MAX_GAMMA)
    last = make_decoding("single", Combination.only(2, 1))
    steps = steps_of_reading([1, 2] * 200, last, busy)
    assert len(steps) > 10
    assert all(step.num_decoding for step in steps)


def test_a_prompt_is_read_by_whichever_model_runs() -> None:
    """Not by one model after the other."""
    last = make_decoding("single", Combination.only(2, 1))
    steps = steps_of_reading([1, 2] * 48, make_decoding("standard", WEIGHTED), last)
    assert all(step.num_prefill_tokens for step in steps[:-1])

"""Proposals from a shortlist: the same law, the same greedy text, and the head used once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest

from server.core.combination import Combination
from server.core.proposal import Proposal
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.engine.engine import Engine
from server.runner.base import ModelRunner
from tests.engine.test_exactness import COMBINATIONS, KERNELS, make_lms
from tests.support.engines import decode, generated, make_decoding, make_engine, run
from tests.support.exact import WRONG_LAW, Z_LIMIT, chi_square_z, exact_law
from tests.support.table_lm import TableLM, TableShortlist

PROMPT = [0, 2, 1]
NUM_SAMPLES = 1200
SCHEDULES: dict[str, tuple[str, int | tuple[int, ...]]] = {
    "speculative": ("speculative", 3),
    "cos": ("cos", 3),
    "cos-each": ("cos", (3, 3)),
}
WARPS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 1, "temperature": 0.8},
    "top-p": {"top_p": 0.6},
    "min-p": {"min_p": 0.4},
    "penalties": {"presence_penalty": 0.5, "repetition_penalty": 1.4},
    "half-allowed": {"allowed_token_ids": (0, 1)},
    # Nothing that the request allows is on the shortlist.
    "none-allowed": {"allowed_token_ids": (1,), "logit_bias": ((1, 0.5),)},
    "banned": {"logit_bias": ((0, float("-inf")), (2, float("-inf")))},
}


def check_law(
    shortlists: list[list[int] | None],
    combination: Combination,
    schedule: str,
    warp: dict[str, Any] | None = None,
    eos: frozenset[int] = frozenset(),
) -> None:
    lms = make_lms(len(combination.weights))
    options = {"max_tokens": 4, **(warp or {})}
    params = [SamplingParams(**options, seed=seed) for seed in range(NUM_SAMPLES)]
    strategy, gamma = SCHEDULES[schedule]
    if isinstance(gamma, tuple):
        gamma = (gamma * 2)[: len(lms)]
    decoding = make_decoding(strategy, combination, gamma)
    engine = make_engine(
        lms, eos=eos, max_sequences=500, max_step_tokens=4096, shortlists=shortlists
    )
    samples = decode(engine, PROMPT, params, decoding)
    law = exact_law(lms, combination, params[0], PROMPT, eos)
    assert chi_square_z(samples, law) < Z_LIMIT
    assert deferred(engine.runners[0]).num_deferred > 0
    engine.scheduler.check_integrity()


def deferred(runner: ModelRunner) -> TableShortlist:
    assert isinstance(runner.deferred, TableShortlist)
    return runner.deferred


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_law_of_every_combination(name: str, schedule: str) -> None:
    combination = COMBINATIONS[name]
    num_models = len(combination.weights)
    check_law([[0, 2], [1], None][:num_models], combination, schedule)


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("warp", [{}, {"top_p": 0.6}])
@pytest.mark.parametrize("listed", [[2], [0, 2]])
def test_law_where_some_shortlists_are_empty(
    listed: list[int], warp: dict[str, Any], verification: str
) -> None:
    """The model gives nothing to any token on it: it proposes from the whole vocabulary there."""
    combination = COMBINATIONS["contrastive-2"]
    lms = make_lms(2, zero_share=0.6)
    params = [SamplingParams(max_tokens=4, seed=seed, **warp) for seed in range(NUM_SAMPLES)]
    decoding = make_decoding("speculative", combination, 3, verification=verification)
    engine = make_engine(lms, max_sequences=500, max_step_tokens=4096, shortlists=[listed, None])
    samples = decode(engine, PROMPT, params, decoding)
    assert chi_square_z(samples, exact_law(lms, combination, params[0], PROMPT)) < Z_LIMIT
    assert deferred(engine.runners[0]).num_deferred > 0


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("name", ["weighted-2", "contrastive-2"])
def test_law_under_warps(name: str, warp: str) -> None:
    check_law([[0, 2], None], COMBINATIONS[name], "cos", WARPS[warp])


@pytest.mark.parametrize(
    ("name", "zero_share"), [("weighted-2", 0.0), ("weighted-2", 0.6), ("contrastive-2", 0.0)]
)
def test_tokens_are_the_same_without_kernels(name: str, zero_share: float) -> None:
    """Also where a model gives nothing to its shortlist."""
    warps = [*WARPS.values(), {}, {"is_seeded": True}]
    params = [
        SamplingParams(max_tokens=4, seed=seed, **warps[seed % len(warps)]) for seed in range(400)
    ]
    decoding = make_decoding("cos", COMBINATIONS[name], 3)
    texts = []
    for kernels in KERNELS:
        shortlists = [[0, 2], None]
        lms = make_lms(2, zero_share=zero_share)
        engine = make_engine(lms, shortlists=shortlists, cpu_kernels=kernels)
        texts.append(decode(engine, PROMPT, params, decoding))
        assert deferred(engine.runners[0]).num_deferred > 0
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 10


def test_law_where_the_end_of_text_is_not_listed() -> None:
    check_law([[0, 2], None], COMBINATIONS["weighted-2"], "cos", eos=frozenset({1}))


def test_a_distribution_other_than_the_drawn_one_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Verification that takes the whole vocabulary's distribution for the shortlist's."""
    propose = Sequence.propose

    def forgetful(self: Sequence, token_id: int, proposal: Proposal) -> None:
        propose(self, token_id, proposal._replace(from_shortlist=False))

    monkeypatch.setattr(Sequence, "propose", forgetful)
    with pytest.raises(AssertionError, match=WRONG_LAW):
        check_law([[0, 2], None], COMBINATIONS["weighted-2"], "cos")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["weighted-2", "contrastive-2"])
def test_greedy_text_is_that_of_standard(name: str, schedule: str) -> None:
    combination = COMBINATIONS[name]
    lms = [TableLM(seed=5 + k, vocab_size=12) for k in range(2)]
    params = [SamplingParams(max_tokens=40, temperature=0)]
    prompts = [[i, 3, 2 * i % 12] for i in range(4)]
    strategy, gamma = SCHEDULES[schedule]
    listed = make_engine(lms, shortlists=[range(6), None])
    plain = make_engine(lms)
    for prompt in prompts:
        ours = decode(listed, prompt, params, make_decoding(strategy, combination, gamma))
        assert ours == decode(plain, prompt, params, make_decoding("standard", combination))
    assert deferred(listed.runners[0]).num_scored > 0


@pytest.mark.parametrize("gamma", [3, 4])
def test_the_whole_head_is_used_once_for_a_position(gamma: int) -> None:
    """Logprobs and plausibility read the scores of a position again and again."""
    steps: list[StepStats] = []
    engine = make_engine(
        [TableLM(seed=5 + k, vocab_size=12) for k in range(2)],
        shortlists=[range(6), None],
        on_step=steps.append,
    )
    combination = Combination.contrastive(2, 0.5, plausibility=0.1)
    params = [SamplingParams(max_tokens=30, seed=1, logprobs=3)]
    decode(engine, PROMPT, params, make_decoding("cos", combination, gamma))
    num_decided = sum(sum(stats.tails) + stats.num_drawn for stats in steps)
    assert deferred(engine.runners[0]).num_scored <= num_decided


@pytest.mark.parametrize(("strategy", "gamma"), [("standard", 4), ("mixture", 4), ("cos", 2)])
def test_nothing_is_deferred_where_it_does_not_pay(strategy: str, gamma: int) -> None:
    engine = make_engine(make_lms(2), shortlists=[[0, 2], None])
    decoding = make_decoding(strategy, COMBINATIONS["weighted-2"], gamma, kappa=1)
    decode(engine, PROMPT, [SamplingParams(max_tokens=20, seed=1)], decoding)
    assert deferred(engine.runners[0]).num_deferred == 0


def make_sequences() -> list[Sequence]:
    """Some with proposals from the shortlist, some without."""
    combination = Combination.contrastive(2, 0.3)
    return [
        Sequence.start(
            f"s{i}",
            [(3 * i + j) % 20 for j in range(1 + i)],
            SamplingParams(max_tokens=5 + i, seed=i),
            make_decoding("cos", combination, gamma=(1 + i % 4, 1)),
        )
        for i in range(16)
    ]


def engine_of(**limits: Any) -> Engine:
    lms = [TableLM(seed=70 + k, vocab_size=20) for k in range(2)]
    return make_engine(lms, shortlists=[range(0, 20, 2), [1]], **limits)


def test_batch_chunking_and_preemption_change_nothing() -> None:
    alone = []
    for sequence in make_sequences():
        alone.append(generated(run(engine_of(), [sequence])[sequence.id]))
    engine = engine_of(num_pages=24, max_step_tokens=11)
    sequences = make_sequences()
    deltas = run(engine, sequences, engine.scheduler.check_integrity)
    assert [generated(deltas[s.id]) for s in sequences] == alone
    assert sum(s.stats.num_preemptions for s in sequences) > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_coupled_text_is_that_of_standard(schedule: str) -> None:
    """A proposal is the proposer's own pick from its shortlist, with the position's noise."""
    strategy, gamma = SCHEDULES[schedule]
    combination = Combination.contrastive(2, 0.3)
    lms = [TableLM(seed=5 + k, vocab_size=12) for k in range(2)]
    coupled = [SamplingParams(max_tokens=30, seed=s, is_seeded=True) for s in range(8)]
    coupled += [SamplingParams(max_tokens=9, seed=1, is_seeded=True, allowed_token_ids=(7, 9))]
    listed = make_engine(lms, shortlists=[range(6), None])
    ours = decode(listed, PROMPT, coupled, make_decoding(strategy, combination, gamma))
    standard = make_decoding("standard", combination)
    assert ours == decode(make_engine(lms), PROMPT, coupled, standard)
    assert deferred(listed.runners[0]).num_scored > 0


class Alternating:
    """A chooser that takes up shortlists and leaves them again."""

    def __init__(self) -> None:
        self._num_asked = 0

    def choose(self, sequence: Sequence) -> DecodingParams:
        self._num_asked += 1
        name: Literal["standard", "cos"] = "cos" if self._num_asked % 5 > 2 else "standard"
        return replace(sequence.decoding, strategy=name, is_gamma_auto=False)

    def add(self, sequence: Sequence, model: int, accepted: float) -> None:
        pass

    def lookup_length(self, sequence: Sequence, rate: float, num_found: int) -> int:
        return 0


def test_what_was_scored_before_a_choice_is_no_state_to_propose_from() -> None:
    """Twins, everything listed: a proposal from its own place's scores is always accepted."""
    engine = make_engine([TableLM(seed=5, vocab_size=12)] * 2, shortlists=[range(12), None])
    engine._strategies.chooser = Alternating()
    decoding = make_decoding("auto", Combination.weighted([0.5, 0.5]), gamma=(3, 1))
    sequences = [
        Sequence.start(f"s{i}", [i, 3], SamplingParams(max_tokens=60, temperature=0), decoding)
        for i in range(4)
    ]
    run(engine, sequences)
    for sequence in sequences:
        assert sequence.stats.verified[0] > 0
        assert sequence.stats.accepted == sequence.stats.verified
    assert deferred(engine.runners[0]).num_deferred > 0

"""The promise: every strategy's output law is that of standard collaborative decoding.

Table LMs are enumerated exactly (tests/support/exact.py, written apart from the product) and
samples of the whole engine are compared by chi-square. Seeds are fixed, so a test either always
passes or always fails. For a correct engine and fresh seeds one comparison exceeds z = 4.5 with
probability 3.4e-6, so any of the fewer than 220 here would fail with probability below 7.5e-4.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from server.config import VerificationName
from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.decoding import warp
from server.engine import distributions
from server.runner.attention_choice import CpuKernels
from tests.support.engines import decode, generated, make_decoding, make_engine, run
from tests.support.exact import WRONG_LAW, Z_LIMIT, chi_square_z, exact_law
from tests.support.table_lm import TableLM

PROMPT = [0, 2, 1]
NUM_SAMPLES = 2000
KERNELS: tuple[CpuKernels, ...] = ("auto", "off")
VERIFICATIONS: tuple[VerificationName, ...] = ("token", "block")

COMBINATIONS = {
    "weighted-2": Combination.weighted([0.3, 0.7]),
    "contrastive-2": Combination.contrastive(2, 0.4),
    "linear-2": Combination.linear([0.7, 0.6]),
    "weighted-3": Combination.weighted([0.2, 0.5, 0.3]),
    "contrastive-3": Combination.contrastive(3, 0.4),
    "linear-3": Combination.linear([0.5, -0.3, 0.9]),
}
DEGENERATE = {
    "first-only": Combination.weighted([1.0, 0.0]),
    "last-only": Combination.weighted([0.0, 1.0]),
    "mu-zero": Combination.contrastive(2, 0.0),
    "middle-zero": Combination.weighted([0.5, 0.0, 0.5]),
    "first-zero": Combination.weighted([0.0, 0.4, 0.6]),
    "plausible": Combination.contrastive(2, 0.5, plausibility=0.3),
}
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "speculative-1": ("speculative", {"gamma": 1}),
    "speculative-3": ("speculative", {"gamma": 3}),
    "cos-1": ("cos", {"gamma": 1}),
    "cos-3": ("cos", {"gamma": 3}),
    "cos-each-2": ("cos", {"gamma": 2, "each": True}),
}
MIXTURES: dict[str, dict[str, Any]] = {
    "kappa-0": {"kappa": 0},
    "kappa-1": {"kappa": 1},
    "kappa-2": {"kappa": 2, "gamma": 4},
    "kappa-3-short": {"kappa": 3, "gamma": 2},
}
WARPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "top-k": {"top_k": 2, "temperature": 0.8},
    "top-p": {"top_p": 0.75},
    "min-p": {"min_p": 0.4},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.4},
    "bias": {"logit_bias": ((0, 1.0), (2, -0.5))},
    "allowed": {"allowed_token_ids": (0, 2)},
    "bad-words": {"bad_words": ((0, 1), (2, 2, 0), (1, 1))},
}


def make_lms(num_models: int, zero_share: float = 0.0) -> list[TableLM]:
    return [TableLM(seed=11 + k, zero_share=zero_share) for k in range(num_models)]


def decoding_of(schedule: str, combination: Combination) -> DecodingParams:
    if schedule in MIXTURES:
        return make_decoding("mixture", combination, **MIXTURES[schedule])
    strategy, options = SCHEDULES[schedule]
    gamma = options.get("gamma", 3)
    num_models = len(combination.weights)
    lengths = (gamma,) * num_models if options.get("each") else gamma
    return make_decoding(strategy, combination, lengths)


def check_law(
    lms: list[TableLM],
    decoding: DecodingParams,
    warp: dict[str, Any] | None = None,
    eos: frozenset[int] = frozenset(),
    num_samples: int = NUM_SAMPLES,
    combination: Combination | None = None,
    cpu_kernels: CpuKernels = "auto",
) -> None:
    options = {"max_tokens": 4, **(warp or {})}
    params = [SamplingParams(**options, seed=seed) for seed in range(num_samples)]
    engine = make_engine(
        lms, eos=eos, max_sequences=500, max_step_tokens=4096, cpu_kernels=cpu_kernels
    )
    samples = decode(engine, PROMPT, params, decoding)
    law = exact_law(lms, combination or decoding.combination, params[0], PROMPT, eos)
    assert sum(law.values()) == pytest.approx(1)
    assert chi_square_z(samples, law) < Z_LIMIT
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_law_of_every_strategy_and_combination(name: str, schedule: str) -> None:
    combination = COMBINATIONS[name]
    check_law(make_lms(len(combination.weights)), decoding_of(schedule, combination))


@pytest.mark.parametrize("schedule", ["speculative-3", "cos-3", "cos-each-2"])
@pytest.mark.parametrize(
    ("name", "zero_share", "temperature"),
    [("weighted-2", 0.0, 1.0), ("contrastive-3", 0.0, 1.7), ("weighted-3", 0.4, 0.8)],
)
def test_law_of_token_verification(
    name: str, zero_share: float, temperature: float, schedule: str
) -> None:
    combination = COMBINATIONS[name]
    lms = make_lms(len(combination.weights), zero_share)
    decoding = replace(decoding_of(schedule, combination), verification="token")
    check_law(lms, decoding, {"temperature": temperature})


@pytest.mark.parametrize(
    ("strategy", "verification", "options", "rule"),
    [
        ("cos", "block", {}, "block"),
        ("cos", "token", {}, "token"),
        ("mixture", "block", {}, "token"),
        ("cos", "block", {"is_seeded": True}, "coupled"),
        ("cos", "token", {"temperature": 0.0}, "coupled"),
    ],
)
def test_tokens_are_verified_as_was_asked_for(
    strategy: str, verification: str, options: dict[str, Any], rule: str
) -> None:
    """Their law does not tell: it is the same by every rule."""
    decoding = make_decoding(strategy, COMBINATIONS["weighted-2"], verification=verification)
    sequence = Sequence.start("s", [0], SamplingParams(**options), decoding)
    assert make_engine(make_lms(2))._advancer._decider.way(sequence).rule == rule


@pytest.mark.parametrize(
    ("strategy", "gamma"),
    [
        ("speculative", (6, 6)),
        ("speculative", (2, 5)),
        ("cos", (6, 6)),
        ("cos", (6, 1)),
        ("cos", (2, 5)),
    ],
)
def test_law_of_long_blocks(strategy: str, gamma: tuple[int, int]) -> None:
    lms = [TableLM(seed=51 + k, vocab_size=2, spread=2.0) for k in range(2)]
    decoding = make_decoding(strategy, COMBINATIONS["contrastive-2"], gamma)
    check_law(lms, decoding, {"max_tokens": 7})


def test_a_block_needs_new_uniforms_after_a_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept has depended on the uniforms of tokens behind it; used again they bias."""
    lms = [TableLM(seed=51 + k, vocab_size=2, spread=2.0) for k in range(2)]
    combination = COMBINATIONS["contrastive-2"]
    long = {"max_tokens": 7}
    monkeypatch.setattr(distributions, "round_seed", lambda seed, num_rejections: seed)
    with pytest.raises(AssertionError, match=WRONG_LAW):
        check_law(lms, make_decoding("speculative", combination, 6), long)
    check_law(lms, make_decoding("speculative", combination, 6, verification="token"), long)


@pytest.mark.parametrize("schedule", ["speculative-3", "cos-each-2"])
@pytest.mark.parametrize("warp", [name for name in WARPS if name != "plain"])
@pytest.mark.parametrize("name", ["weighted-2", "contrastive-2"])
def test_law_under_every_warp(name: str, warp: str, schedule: str) -> None:
    check_law(make_lms(2), decoding_of(schedule, COMBINATIONS[name]), dict(WARPS[warp]))


@pytest.mark.parametrize(
    ("name", "schedule", "warp", "verification"),
    [
        ("weighted-2", "cos-each-2", "top-p", "block"),
        ("contrastive-3", "cos-each-2", "hot", "token"),
        ("weighted-2", "kappa-2", "penalties", "block"),
    ],
)
def test_law_without_kernels(
    name: str, schedule: str, warp: str, verification: VerificationName
) -> None:
    """Few, for the next test shows that the tokens are the same."""
    combination = COMBINATIONS[name]
    decoding = replace(decoding_of(schedule, combination), verification=verification)
    lms = make_lms(len(combination.weights))
    check_law(lms, decoding, dict(WARPS[warp]), cpu_kernels="off")


@pytest.mark.parametrize(
    ("name", "schedule", "warp", "options"),
    [
        *(("weighted-2", s, warp, {}) for warp in WARPS for s in ("cos-each-2", "kappa-2")),
        *(("plausible", "cos-each-2", warp, {}) for warp in WARPS),
        *(("weighted-2", "cos-each-2", warp, {"is_seeded": True}) for warp in WARPS),
        ("plausible", "standard", "plain", {}),
        ("linear-3", "cos-each-2", "plain", {}),
        ("linear-3", "speculative-3", "top-p", {}),
    ],
)
def test_tokens_are_the_same_without_kernels(
    name: str, schedule: str, warp: str, options: dict[str, Any]
) -> None:
    """Both ways read the same uniforms, and with either verification."""
    combination = (COMBINATIONS | DEGENERATE)[name]
    lms = make_lms(len(combination.weights))
    decoding = decoding_of(schedule, combination)
    params = [
        SamplingParams(max_tokens=4, seed=seed, **WARPS[warp], **options) for seed in range(200)
    ]
    for verification in VERIFICATIONS:
        found, expected = (
            decode(
                make_engine(lms, max_sequences=200, max_step_tokens=4096, cpu_kernels=kernels),
                PROMPT,
                params,
                replace(decoding, verification=verification),
            )
            for kernels in KERNELS
        )
        assert found == expected
        assert len(set(found)) > 1


@pytest.mark.parametrize("is_seeded", [False, True])
@pytest.mark.parametrize("schedule", ["speculative-3", "cos-each-2", "kappa-2"])
def test_law_of_proposals_from_the_head(
    schedule: str, is_seeded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Top-p keeps two or three of three tokens, and proposals are always the best one."""
    monkeypatch.setattr(warp, "_HEAD", 1)
    weighted = COMBINATIONS["weighted-2"]
    options = {"top_p": 0.9, "is_seeded": is_seeded}
    check_law(make_lms(2), decoding_of(schedule, weighted), options, cpu_kernels="off")


@pytest.mark.parametrize("schedule", ["speculative-3", "cos-each-2"])
@pytest.mark.parametrize("warp", ["top-k", "top-p", "min-p"])
@pytest.mark.parametrize("name", ["linear-2", "weighted-3", "contrastive-3", "linear-3"])
def test_law_of_every_combination_under_truncation(name: str, warp: str, schedule: str) -> None:
    combination = COMBINATIONS[name]
    lms = make_lms(len(combination.weights))
    check_law(lms, decoding_of(schedule, combination), WARPS[warp])


@pytest.mark.parametrize("schedule", ["standard", "speculative-3", "cos-each-2"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_law_of_degenerate_combinations(name: str, schedule: str) -> None:
    combination = DEGENERATE[name]
    check_law(make_lms(len(combination.weights)), decoding_of(schedule, combination))


@pytest.mark.parametrize("schedule", ["standard", "cos-each-2"])
@pytest.mark.parametrize("warp", ["allowed", "bad-words", "penalties"])
def test_plausible_are_tokens_beside_those_that_are_allowed(warp: str, schedule: str) -> None:
    check_law(make_lms(2), decoding_of(schedule, DEGENERATE["plausible"]), dict(WARPS[warp]))


@pytest.mark.parametrize("schedule", ["speculative-3", "cos-each-2"])
@pytest.mark.parametrize("name", ["weighted-2", "contrastive-2", "linear-3", "weighted-3"])
def test_law_with_end_of_text(name: str, schedule: str) -> None:
    combination = COMBINATIONS[name]
    check_law(
        make_lms(len(combination.weights)), decoding_of(schedule, combination), eos=frozenset({1})
    )


@pytest.mark.parametrize("schedule", ["speculative-3", "cos-3", "cos-each-2"])
@pytest.mark.parametrize("name", ["weighted-2", "weighted-3", "contrastive-2"])
def test_law_with_zeros_in_either_support(name: str, schedule: str) -> None:
    combination = COMBINATIONS[name]
    lms = make_lms(len(combination.weights), zero_share=0.4)
    check_law(lms, decoding_of(schedule, combination))


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("name", ["weighted-2", "weighted-3", "last-only", "middle-zero"])
def test_law_of_mixtures(name: str, mixture: str) -> None:
    combination = (COMBINATIONS | DEGENERATE)[name]
    check_law(make_lms(len(combination.weights)), decoding_of(mixture, combination))


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("warp", ["top-k", "top-p", "penalties"])
def test_law_of_mixtures_under_warps(warp: str, mixture: str) -> None:
    decoding = decoding_of(mixture, COMBINATIONS["weighted-2"])
    check_law(make_lms(2), decoding, dict(WARPS[warp]))


@pytest.mark.parametrize("name", ["weighted-2", "contrastive-2", "weighted-3", "first-zero"])
def test_law_of_seeded_requests(name: str) -> None:
    """By standard decoding: the next but one shows that all others write the same."""
    combination = (COMBINATIONS | DEGENERATE)[name]
    lms = make_lms(len(combination.weights))
    check_law(lms, decoding_of("standard", combination), {"is_seeded": True})


@pytest.mark.parametrize("warp", ["top-k", "top-p", "min-p", "penalties", "allowed"])
def test_law_of_seeded_requests_under_warps(warp: str) -> None:
    decoding = decoding_of("cos-each-2", COMBINATIONS["weighted-2"])
    check_law(make_lms(2), decoding, {**WARPS[warp], "is_seeded": True})


@pytest.mark.parametrize("zero_share", [0.0, 0.4])
@pytest.mark.parametrize("name", [*COMBINATIONS, *DEGENERATE])
def test_seeded_text_is_that_of_standard_whoever_proposes(name: str, zero_share: float) -> None:
    """Token for token: a function of the seed and of the target alone."""
    combination = (COMBINATIONS | DEGENERATE)[name]
    num_models = len(combination.weights)
    lms = [TableLM(40 + k, vocab_size=12, zero_share=zero_share) for k in range(num_models)]
    params = [
        SamplingParams(max_tokens=12, seed=seed, is_seeded=True, **WARPS[warp])
        for seed, warp in enumerate(["plain", "hot", "top-k", "top-p", "min-p", "penalties"])
    ]
    params.append(SamplingParams(max_tokens=12, seed=9, is_seeded=True, logprobs=2))
    ways: list[tuple[str, CpuKernels]] = [(schedule, "auto") for schedule in SCHEDULES]
    if zero_share:
        ways = [("standard", "auto"), ("standard", "off"), ("cos-each-2", "auto")]
    texts = []
    for schedule, cpu_kernels in ways:
        engine = make_engine(lms, cpu_kernels=cpu_kernels)
        texts.append(decode(engine, PROMPT, params, decoding_of(schedule, combination)))
    assert len(set(map(tuple, texts))) == 1
    assert len(set(texts[0])) > 1


@pytest.mark.parametrize("name", ["weighted-2", "weighted-3"])
def test_seeded_mixtures(name: str) -> None:
    """Coins and noise are functions of the seed, so the length of windows changes nothing."""
    combination = COMBINATIONS[name]
    lms = make_lms(len(combination.weights))
    seeded = {"is_seeded": True}
    check_law(lms, make_decoding("mixture", combination, kappa=2, gamma=4), seeded)
    params = [SamplingParams(max_tokens=9, seed=seed, is_seeded=True) for seed in range(20)]
    texts = [
        decode(make_engine(lms), PROMPT, params, make_decoding("mixture", combination, **mixture))
        for mixture in MIXTURES.values()
    ]
    assert len(set(map(tuple, texts))) == 1


def test_law_of_single() -> None:
    only = Combination.only(2, 1)
    check_law(make_lms(2), make_decoding("single", only), combination=only)


@pytest.mark.parametrize(
    ("name", "mixture"),
    [
        ("weighted-2", "kappa-0"),
        ("weighted-2", "kappa-2"),
        ("weighted-3", "kappa-1"),
        ("weighted-3", "kappa-3-short"),
    ],
)
def test_law_of_each_sequence_on_shared_coins(name: str, mixture: str) -> None:
    """Sequences of a batch depend on each other, so one of each batch is sampled.

    The other one keeps the stream of coins busy: its rejections and its end decide when coins are
    looked at. Members that disagree and long windows make a coin that is chosen by its value show:
    rejoining at the last coin looked at, not the first fresh one, gives z > 10 here.
    """
    combination = COMBINATIONS[name]
    num_models = len(combination.weights)
    lms = [TableLM(seed=11 + k, vocab_size=2, spread=3.0) for k in range(num_models)]
    decoding = make_decoding("mixture", combination, shared_coins=True, **MIXTURES[mixture])
    engine = make_engine(lms, coin_seed=5)
    samples = []
    for batch in range(600):
        sequences = [
            Sequence.start(
                f"{batch}-{k}",
                [0] * (1 + k),
                SamplingParams(max_tokens=7, seed=2 * batch + k),
                decoding,
            )
            for k in range(2)
        ]
        samples.append(generated(run(engine, sequences)[f"{batch}-1"]))
    law = exact_law(lms, combination, SamplingParams(max_tokens=7), [0, 0])
    assert chi_square_z(samples, law) < Z_LIMIT


@pytest.mark.parametrize("schedule", ["cos-3", "cos-each-2", "speculative-3"])
def test_law_under_mixed_neighbours(schedule: str) -> None:
    """Sequences of other strategies, combinations and warps in the same batches change nothing."""
    combination = COMBINATIONS["contrastive-2"]
    lms = make_lms(2)
    engine = make_engine(lms, max_sequences=64, max_step_tokens=64)
    decoding = decoding_of(schedule, combination)
    weighted = COMBINATIONS["weighted-2"]
    neighbours = [
        (make_decoding("standard", weighted), SamplingParams(max_tokens=5, temperature=0.0)),
        (make_decoding("mixture", weighted, kappa=2), SamplingParams(max_tokens=2, top_k=2)),
        (make_decoding("single", Combination.only(2, 0)), SamplingParams(max_tokens=7)),
    ]
    sequences = []
    for seed in range(NUM_SAMPLES):
        params = SamplingParams(max_tokens=4, seed=seed)
        sequences.append(Sequence.start(f"s{seed}", PROMPT, params, decoding))
        other, other_params = neighbours[seed % 3]
        sequences.append(Sequence.start(f"n{seed}", [1] * (1 + seed % 9), other_params, other))
    deltas = run(engine, sequences)
    samples = [generated(deltas[f"s{seed}"]) for seed in range(NUM_SAMPLES)]
    law = exact_law(lms, combination, SamplingParams(max_tokens=4), PROMPT)
    assert chi_square_z(samples, law) < Z_LIMIT


@pytest.mark.parametrize("eos", [frozenset(), frozenset({4})])
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "standard"])
@pytest.mark.parametrize("name", [*COMBINATIONS, *DEGENERATE])
def test_greedy_output_is_that_of_standard(name: str, schedule: str, eos: frozenset[int]) -> None:
    combination = (COMBINATIONS | DEGENERATE)[name]
    lms = [TableLM(seed=40 + k, vocab_size=6) for k in range(len(combination.weights))]
    params = [
        SamplingParams(max_tokens=12, temperature=0.0),
        SamplingParams(max_tokens=12, temperature=0.0, frequency_penalty=0.8),
        SamplingParams(max_tokens=12, temperature=0.0, top_k=1, min_tokens=3),
    ]
    texts = [
        decode(
            make_engine(lms, eos=eos, cpu_kernels=cpu_kernels),
            PROMPT,
            params,
            decoding_of(kind, combination),
        )
        for kind, cpu_kernels in (("standard", "auto"), (schedule, "auto"), (schedule, "off"))
    ]
    assert texts[0] == texts[1] == texts[2]
    if not eos:
        law = exact_law(lms, combination, params[0], PROMPT)
        assert law == {texts[0][0]: 1.0}


def test_a_wrong_law_is_noticed() -> None:
    """The comparison has teeth: weights off by 0.2 are found at this sample size."""
    lms = make_lms(2)
    with pytest.raises(AssertionError, match=WRONG_LAW):
        check_law(
            lms,
            make_decoding("cos", Combination.weighted([0.3, 0.7])),
            combination=Combination.weighted([0.5, 0.5]),
        )


@pytest.mark.parametrize("schedule", ["speculative-3", "cos-3", "cos-each-2"])
def test_law_where_a_proposer_gives_nothing_to_what_is_allowed(schedule: str) -> None:
    """It then proposes nothing, and the request is served as by standard decoding."""
    lms = [TableLM(seed=31, zero_share=0.6), *make_lms(2)[1:]]
    rows = [lms[0].logits(PROMPT), *(lms[0].logits([*PROMPT, token]) for token in (0, 2))]
    assert any(row[0] == row[2] == -math.inf for row in rows)
    decoding = decoding_of(schedule, COMBINATIONS["contrastive-2"])
    warp = {"allowed_token_ids": (0, 2)}
    check_law(lms, decoding, warp, num_samples=800)
    check_law(lms, decoding, {**warp, "temperature": 0.0}, num_samples=1)

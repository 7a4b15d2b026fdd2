"""Kernels decide as torch's operations do: the same greedy tokens, and draws of the same laws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Row
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from server.cache.score_store import ScoreStore
from server.core.combination import Combination
from server.core.proposal import Proposal
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.decoding.rng import Purpose
from server.decoding.strategies import SharedCoins, Strategies
from server.decoding.verify import INVALID, block_tests
from server.decoding.warp import Place, Warp
from server.engine.decider import Decider, find_kernels
from server.engine.distributions import Distributions
from server.engine.scores import Scores
from server.errors import ConfigError
from server.runner.attention_choice import CpuKernels
from server.runner.base import Batch, Span
from server.simd import support
from tests.support.engines import make_decoding
from tests.support.table_lm import TableLM, TableRunner
from tests.support.threads import threads

if reason := support.missing():
    pytest.skip(f"the kernels cannot run here: {reason}", allow_module_level=True)

from server.engine.row_kernels import RowKernels

COMBINATIONS = {
    "weighted": Combination.weighted([0.5, 0.3, 0.2]),
    "last two": Combination.weighted([0.0, 0.4, 0.6]),
    "one": Combination.only(3, 1),
    "contrastive": Combination.contrastive(3, 0.4),
    "plausible": Combination.contrastive(3, 0.4, plausibility=0.1),
    "plausible to the second": Combination("linear", (-0.3, 1.1, -0.2), 0.2, reference=1),
    "linear": Combination.linear([0.5, -0.3, 0.9]),
}
NONE: Mapping[str, Any] = {}
TRUNCATIONS = {
    "none": NONE,
    "top-p": {"top_p": 0.7},
    "top-k": {"top_k": 2},
    "min-p": {"min_p": 0.05},
    "all": {"top_p": 0.9, "top_k": 40, "min_p": 0.001},
    "wide": {"top_p": 0.999, "top_k": 10**6},
}
ADJUSTMENTS: dict[str, Mapping[str, Any]] = {
    "repetition": {"repetition_penalty": 1.4},
    "frequency": {"frequency_penalty": 0.7, "presence_penalty": -0.4},
    "bias": {"logit_bias": ((0, 2.5), (2, -100.0), (9, -3.0))},
    "allowed": {"allowed_token_ids": (0, 3, 7, 8, 9, 15)},
    "bad words": {"bad_words": ((1,), (0, 7), (0, 0))},
    "min tokens": {"min_tokens": 2, "stop_token_ids": frozenset({0, 5})},
    "all": {
        "repetition_penalty": 0.7,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.9,
        "logit_bias": ((8, 4.0), (9, 1.0)),
        "allowed_token_ids": tuple(range(14)),
        "bad_words": ((3,),),
        "min_tokens": 9,
        "top_p": 0.9,
    },
}
SIZES = [1, 3, 16, 257, 1500]
CPU = torch.device("cpu")
NUM_WINDOWS, LENGTH = 12, 3


class RowsRunner:
    """Says what it is told to."""

    deferred: Listed | None = None
    device = CPU

    def __init__(self, vocab_size: int, dtype: torch.dtype) -> None:
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.rows = torch.empty(0)

    def forward(self, batch: Batch) -> Tensor:
        return self.rows


class Listed:
    """DeferredScores of a RowsRunner; a state is its row."""

    def __init__(self, runner: RowsRunner, ids: Tensor) -> None:
        self.state_size = runner.vocab_size
        self.shortlist = ids
        self._runner = runner

    def states(self, batch: Batch) -> Tensor:
        return self._runner.rows

    def scores(self, states: Tensor) -> Tensor:
        return states

    def shortlist_scores(self, states: Tensor) -> Tensor:
        return states[:, self.shortlist]


class EvenMatcher:
    """Allows even tokens, and 1 after 0; of the first text, token 10 alone."""

    error = None

    def __init__(self, vocab_size: int, number: int) -> None:
        self._size = vocab_size
        self._number = number

    def mask(self, generated: Row[int]) -> bytes:
        bits = np.zeros(-(-self._size // 8) * 8, np.uint8)
        bits[0::2] = 1
        bits[1] = list(generated[-1:]) == [0]
        if self._number == 0:
            bits[:] = np.arange(len(bits)) == 10
        return np.packbits(bits, bitorder="little").tobytes()

    def end(self, generated: Row[int]) -> int | None:
        return None


class Bench:
    """Windows of tokens that model 0 or 1 proposed, over random scores of three models.

    Scores of model 1 are in bfloat16. Those of some places lie in the store, others where the last
    forward left them. With a shortlist model 0 proposes from it, and has scored no more.
    """

    def __init__(
        self,
        combination: Combination,
        vocab_size: int,
        *,
        temperature: float = 1.0,
        zero_share: float = 0.0,
        seed: int = 0,
        verification: str = "token",
        options: Mapping[str, Any] = NONE,
        shortlist: Tensor | None = None,
        has_grammar: bool = False,
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        dtypes = [torch.float32, torch.bfloat16, torch.float32]
        runners = [RowsRunner(vocab_size, dtype) for dtype in dtypes]
        if shortlist is not None:
            runners[0].deferred = Listed(runners[0], shortlist)
        sizes = (vocab_size, 0, 0)
        store = ScoreStore(
            NUM_WINDOWS, LENGTH + 3, vocab_size, dtypes, [CPU] * 3, state_sizes=sizes
        )
        self.scores = Scores(runners, store)  # type: ignore[arg-type]
        strategies = Strategies(SharedCoins(0))
        distributions = Distributions(self.scores, strategies, frozenset({1}), 3, vocab_size)
        kernels = RowKernels(self.scores, strategies, frozenset({1}), 3, vocab_size)
        self.by_kernels = Decider(distributions, kernels)
        self.by_torch = Decider(distributions, None)
        self.distributions = distributions
        decoding = make_decoding("cos", combination, verification=verification)
        self.sequences = []
        for number in range(NUM_WINDOWS):
            params = SamplingParams(max_tokens=9, temperature=temperature, seed=number, **options)
            matcher = EvenMatcher(vocab_size, number) if has_grammar else None
            sequence = Sequence.start(f"s{number}", [0, 0], params, decoding, matcher=matcher)
            sequence.slot = store.take_slot()
            self.sequences.append(sequence)
        self.places = [(s, 2 + i) for s in self.sequences for i in range(LENGTH + 1)]
        for part in (self.places[:7], self.places[7:]):
            common = torch.randn(len(part), vocab_size, generator=self.random) * 3
            for model, runner in enumerate(runners):
                runner.rows = self._near(common, zero_share).to(runner.dtype)
                spans = tuple(Span([1], 0, [0], 1) for _ in part)
                defer = runner.deferred is not None
                self.scores.forward(model, Batch(spans), part, defer=defer)
        for sequence in self.sequences:
            for i in range(LENGTH):
                model = i % 2
                place = [(sequence, len(sequence))]
                way = self.by_torch.way(sequence)
                is_short = shortlist is not None and model == 0
                token = self.by_torch.propose(model, place, way, is_short)
                sequence.propose(int(token), Proposal(model, is_short))

    def _near(self, common: Tensor, zero_share: float) -> Tensor:
        """Models agree more or less."""
        rows = common + torch.randn(common.shape, generator=self.random) * 0.7
        zeros = torch.rand(common.shape, generator=self.random) < zero_share
        zeros[:, 0] = False
        return rows.masked_fill(zeros, -torch.inf)

    @property
    def pending(self) -> list[Place]:
        """The places of all windows' rows."""
        return [place for place in self.places if place[1] < len(place[0])]

    @property
    def tokens(self) -> Tensor:
        return torch.tensor([s.token_ids[position] for s, position in self.pending])

    def verify(self, decider: Decider) -> Tensor:
        way = decider.way(self.sequences[0])
        return decider.verify(self.pending, self.tokens, [LENGTH] * NUM_WINDOWS, way)

    def rows(self, rows: Tensor) -> np.ndarray:
        return rows.to(torch.float64).numpy()


def assert_drawn(weights: np.ndarray, token: int, uniform: float) -> None:
    """By inverse CDF, but for rounding."""
    assert weights[token] > 0
    total = weights.sum()
    before, after = weights[:token].sum() / total, weights[: token + 1].sum() / total
    assert before - 1e-5 <= uniform <= after + 1e-5


def assert_picked(bench: Bench, rows: Tensor, places: list[Place], tokens: list[int]) -> None:
    """The tokens of most weight beside their noise, but for rounding."""
    noise = bench.distributions._noise(places)
    for row, token in enumerate(tokens):
        quotients = rows[row] / noise[row]
        assert float(quotients[token]) >= float(quotients.max()) * (1 - 1e-5)


def assert_same_decisions(bench: Bench) -> None:
    """By kernels and by torch; nothing is recovered where all is accepted."""
    found, expected = bench.verify(bench.by_kernels), bench.verify(bench.by_torch)
    assert found[:, 0].tolist() == expected[:, 0].tolist()
    rejected = expected[:, 0] < LENGTH
    assert found[rejected].tolist() == expected[rejected].tolist()


def truncated(
    weights: np.ndarray, min_p: float = 0.0, top_k: float = 0, top_p: float = 1.0
) -> np.ndarray:
    """What min-p, top-k and top-p leave, in this order; all that is as probable as the last."""
    kept = np.where(weights >= min_p * weights.max(), weights, 0)
    ordered = np.sort(kept)[::-1]
    ordered = ordered[: int(top_k) or None]
    before = np.cumsum(ordered) - ordered
    last = ordered[before < top_p * ordered.sum()].min() if top_p < 1 else ordered[-1]
    return np.where(kept >= last, kept, 0)


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("zero_share", [0.0, 0.6])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_greedy_tokens_are_the_same(name: str, zero_share: float, vocab_size: int) -> None:
    bench = Bench(COMBINATIONS[name], vocab_size, temperature=0.0, zero_share=zero_share)
    ways = [decider.way(bench.sequences[0]) for decider in (bench.by_kernels, bench.by_torch)]
    assert [way.by_kernels for way in ways] == [True, False]
    found, expected = bench.verify(bench.by_kernels), bench.verify(bench.by_torch)
    assert found[:, 0].tolist() == expected[:, 0].tolist()
    assert len(set(found[:, 0].tolist())) > 1 or vocab_size == 1 or zero_share
    rejected = expected[:, 0] < LENGTH
    assert found[rejected].tolist() == expected[rejected].tolist()
    with threads(2):
        drawn = bench.by_kernels.draw(bench.places, ways[0])
    assert drawn.tolist() == bench.by_torch.draw(bench.places, ways[1]).tolist()
    for model in range(3):
        picked = bench.by_kernels.propose(model, bench.places, ways[0], False)
        assert torch.equal(picked, bench.by_torch.propose(model, bench.places, ways[1], False))


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("zero_share", [0.0, 0.6])
@pytest.mark.parametrize(
    ("truncation", "temperature"), [*((name, 0.6) for name in TRUNCATIONS), ("none", 1.0)]
)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_draws_are_of_the_target(
    name: str, truncation: str, temperature: float, zero_share: float, vocab_size: int
) -> None:
    bench = Bench(
        COMBINATIONS[name],
        vocab_size,
        temperature=temperature,
        zero_share=zero_share,
        seed=1,
        options=TRUNCATIONS[truncation],
    )
    way = bench.by_kernels.way(bench.sequences[0])
    uniforms = bench.distributions.uniforms(bench.places, Purpose.DRAW).tolist()
    targets = bench.rows(bench.distributions.target(bench.places))
    for row, token in enumerate(bench.by_kernels.draw(bench.places, way).tolist()):
        assert_drawn(targets[row], token, uniforms[row])
    uniforms = bench.distributions.uniforms(bench.places, Purpose.PROPOSE).tolist()
    for model in range(3):
        tokens = bench.by_kernels.propose(model, bench.places, way, False).tolist()
        for row, place in enumerate(bench.places):
            logits = bench.rows(bench.scores.read(model, [place])[0]) / temperature
            weights = truncated(np.exp(logits - logits.max()), **TRUNCATIONS[truncation])
            assert_drawn(weights, tokens[row], uniforms[row])


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("zero_share", [0.0, 0.6])
@pytest.mark.parametrize("truncation", ["none", "top-p", "all"])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_windows_end_where_they_should(
    name: str, truncation: str, zero_share: float, vocab_size: int
) -> None:
    for seed in range(3):
        bench = Bench(
            COMBINATIONS[name],
            vocab_size,
            zero_share=zero_share,
            seed=seed,
            options=TRUNCATIONS[truncation],
        )
        accept = bench.distributions.uniforms(bench.pending, Purpose.ACCEPT).tolist()
        recover = bench.distributions.uniforms(bench.pending, Purpose.RECOVER).tolist()
        targets = bench.rows(bench.distributions.target(bench.pending))
        proposals = bench.rows(bench.distributions.proposal(bench.pending))
        for window, (count, recovered) in enumerate(bench.verify(bench.by_kernels).tolist()):
            for i in range(min(count + 1, LENGTH)):
                row = window * LENGTH + i
                token = int(bench.tokens[row])
                ratio = targets[row, token] / proposals[row, token]
                assert (accept[row] < ratio) == (i < count) or abs(accept[row] - ratio) < 1e-4
            if count < LENGTH:
                residual = np.maximum(targets[row] - proposals[row], 0)
                assert_drawn(residual, recovered, recover[row])


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("zero_share", [0.0, 0.6])
@pytest.mark.parametrize("truncation", ["none", "top-p", "all"])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_blocks_end_where_they_should(
    name: str, truncation: str, zero_share: float, vocab_size: int
) -> None:
    lengths = [LENGTH] * NUM_WINDOWS
    for seed in range(2):
        bench = Bench(
            COMBINATIONS[name],
            vocab_size,
            zero_share=zero_share,
            seed=seed,
            verification="block",
            options=TRUNCATIONS[truncation],
        )
        accept = bench.distributions.uniforms(bench.pending, Purpose.ACCEPT).tolist()
        recover = bench.distributions.uniforms(bench.pending, Purpose.RECOVER).tolist()
        target = bench.distributions.target(bench.pending).double()
        proposal = bench.distributions.proposal(bench.pending).double()
        tests, carry = block_tests(target, proposal, bench.tokens, lengths)
        for window, (count, recovered) in enumerate(bench.verify(bench.by_kernels).tolist()):
            rows = range(window * LENGTH, (window + 1) * LENGTH)
            passed = [i + 1 for i, row in enumerate(rows) if accept[row] < tests[row]]
            is_close = any(abs(accept[row] - tests[row]) < 1e-3 for row in rows)
            assert count == max(passed, default=0) or is_close
            if count < LENGTH:
                row = rows[count]
                residual = (carry[row] * target[row] - proposal[row]).clamp_min(0)
                assert_drawn(residual.numpy(), recovered, recover[row])


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize(("truncation", "zero_share"), [("none", 0.0), ("all", 0.0), ("none", 0.6)])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_seeded_picks_are_the_same(
    name: str, truncation: str, zero_share: float, vocab_size: int
) -> None:
    options = {**TRUNCATIONS[truncation], "is_seeded": True}
    bench = Bench(
        COMBINATIONS[name], vocab_size, temperature=0.8, zero_share=zero_share, options=options
    )
    way = bench.by_kernels.way(bench.sequences[0])
    assert (way.rule, way.by_kernels) == ("coupled", True)
    targets = bench.distributions.target(bench.places)
    drawn = bench.by_kernels.draw(bench.places, way).tolist()
    assert_picked(bench, targets, bench.places, drawn)
    for model in range(3):
        logits = bench.scores.read(model, bench.places) / 0.8
        weights = np.exp((logits - logits.amax(-1, keepdim=True)).double().numpy())
        limits = TRUNCATIONS[truncation]
        rows = torch.tensor(np.array([truncated(row, **limits) for row in weights]))
        picked = bench.by_kernels.propose(model, bench.places, way, False).tolist()
        assert_picked(bench, rows, bench.places, picked)
    picks = dict(zip(bench.places, drawn, strict=True))
    for sequence, (count, token) in zip(
        bench.sequences, bench.verify(bench.by_kernels).tolist(), strict=True
    ):
        wanted = [picks[sequence, 2 + i] for i in range(LENGTH)]
        proposed = sequence.token_ids[2:]
        same = [ours == theirs for ours, theirs in zip(wanted, proposed, strict=True)]
        assert count == (same + [False]).index(False)
        assert count == LENGTH or token == wanted[count]


def shortlist_of(size: int) -> Tensor:
    """So many of 1500 tokens."""
    tokens = torch.randperm(1500, generator=torch.Generator().manual_seed(size))[:size]
    return tokens.sort().values


@pytest.mark.parametrize("truncation", ["none", "top-p", "all"])
def test_proposals_from_a_shortlist(truncation: str) -> None:
    limits, ids = TRUNCATIONS[truncation], shortlist_of(300)
    bench = Bench(COMBINATIONS["one"], 1500, temperature=0.8, options=limits, shortlist=ids)
    way = bench.by_kernels.way(bench.sequences[0])
    logits = bench.rows(bench.scores.shortlist(0, bench.places)[0]) / 0.8
    weights = np.zeros((len(logits), 1500))
    for row, listed in enumerate(np.exp(logits - logits.max(-1, keepdims=True))):
        weights[row, ids] = truncated(listed, **limits)
    uniforms = bench.distributions.uniforms(bench.places, Purpose.PROPOSE).tolist()
    tokens = bench.by_kernels.propose(0, bench.places, way, True).tolist()
    for row, token in enumerate(tokens):
        assert_drawn(weights[row][ids], ids.tolist().index(token), uniforms[row])
    seeded = Bench(
        COMBINATIONS["one"],
        1500,
        temperature=0.8,
        options={**limits, "is_seeded": True},
        shortlist=ids,
    )
    coupled = seeded.by_kernels.way(seeded.sequences[0])
    picked = seeded.by_kernels.propose(0, seeded.places, coupled, True).tolist()
    assert_picked(seeded, torch.tensor(weights), seeded.places, picked)


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("truncation", ["none", "top-p", "all"])
def test_windows_from_a_shortlist(truncation: str, verification: str) -> None:
    bench = Bench(
        COMBINATIONS["contrastive"],
        1500,
        verification=verification,
        options=TRUNCATIONS[truncation],
        shortlist=shortlist_of(1200),
    )
    found, expected = bench.verify(bench.by_kernels), bench.verify(bench.by_torch)
    assert torch.equal(found, expected)
    assert len(set(found[:, 0].tolist())) > 1


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"is_seeded": True}])
def test_an_empty_shortlist_is_the_whole_vocabulary(options: Mapping[str, Any]) -> None:
    """In its own row alone: what is proposed elsewhere is from the shortlist."""
    ids = shortlist_of(300)
    bench = Bench(COMBINATIONS["contrastive"], 1500, options=options, shortlist=ids)
    states = bench.scores._store._states[0]
    empty = bench.places[4]
    states[bench.scores.rows([empty])[0], ids] = -torch.inf
    way = bench.by_kernels.way(bench.sequences[0])
    tokens = bench.by_kernels.propose(0, bench.places, way, True).tolist()
    whole = bench.by_kernels.propose(0, [empty], way, False)
    assert tokens[4] == whole[0]
    assert tokens[4] not in ids
    assert set(tokens[:4] + tokens[5:]) <= set(ids.tolist())
    first = bench.sequences[1]
    first.token_ids[2] = tokens[4]
    found = bench.verify(bench.by_kernels)
    assert torch.equal(found, bench.verify(bench.by_torch))


ADJUSTED = [
    *[pytest.param(options, False, id=name) for name, options in ADJUSTMENTS.items()],
    pytest.param({}, True, id="grammar"),
    pytest.param({"allowed_token_ids": tuple(range(12)), "presence_penalty": 1.0}, True, id="both"),
]


@pytest.mark.parametrize("vocab_size", [16, 257, 1500])
@pytest.mark.parametrize(("options", "has_grammar"), ADJUSTED)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_adjusted_greedy_tokens_are_the_same(
    name: str, options: Mapping[str, Any], has_grammar: bool, vocab_size: int
) -> None:
    bench = Bench(
        COMBINATIONS[name],
        vocab_size,
        temperature=0.0,
        zero_share=0.0 if has_grammar else 0.1,
        options=options,
        has_grammar=has_grammar,
    )
    ways = [decider.way(bench.sequences[0]) for decider in (bench.by_kernels, bench.by_torch)]
    assert [way.by_kernels for way in ways] == [True, False]
    assert_same_decisions(bench)
    # Behind the pending tokens, too, which count for penalties.
    places = [place for place in bench.places if place[1] <= len(place[0])]
    drawn = bench.by_kernels.draw(places, ways[0])
    assert torch.equal(drawn, bench.by_torch.draw(places, ways[1]))
    for model in range(3):
        picked = bench.by_kernels.propose(model, places, ways[0], False)
        assert torch.equal(picked, bench.by_torch.propose(model, places, ways[1], False))


@pytest.mark.parametrize("vocab_size", [16, 257, 1500])
@pytest.mark.parametrize(("options", "has_grammar"), ADJUSTED)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_adjusted_draws_are_of_the_target(
    name: str, options: Mapping[str, Any], has_grammar: bool, vocab_size: int
) -> None:
    """And what is verified is decided the same, by token and by block."""
    bench, by_block = (
        Bench(
            COMBINATIONS[name],
            vocab_size,
            temperature=0.8,
            zero_share=0.0 if has_grammar else 0.1,
            seed=2,
            verification=verification,
            options=options,
            has_grammar=has_grammar,
        )
        for verification in ("token", "block")
    )
    way = bench.by_kernels.way(bench.sequences[0])
    assert way.by_kernels
    places = bench.places
    uniforms = bench.distributions.uniforms(places, Purpose.DRAW).tolist()
    targets = bench.rows(bench.distributions.target(places))
    for row, token in enumerate(bench.by_kernels.draw(places, way).tolist()):
        assert_drawn(targets[row], token, uniforms[row])
    uniforms = bench.distributions.uniforms(places, Purpose.PROPOSE).tolist()
    warp = Warp(places, frozenset({1}), CPU, proposing=True)
    for model in range(3):
        probs = bench.rows(warp.probs(bench.scores.read(model, places)))
        tokens = bench.by_kernels.propose(model, places, way, False).tolist()
        for row, token in enumerate(tokens):
            assert_drawn(probs[row], token, uniforms[row])
    assert_same_decisions(bench)
    assert_same_decisions(by_block)


LISTED = torch.cat([torch.arange(1, 12, 3), 16 + shortlist_of(1200)[shortlist_of(1200) < 1484]])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("options", "has_grammar"),
    [
        *ADJUSTED,
        pytest.param({"allowed_token_ids": (0, 3, 12)}, False, id="none listed"),
        pytest.param({"bad_words": tuple((t,) for t in LISTED.tolist())}, False, id="all banned"),
    ],
)
def test_adjusted_tokens_from_a_shortlist(
    options: Mapping[str, Any], has_grammar: bool, temperature: float
) -> None:
    """Which allows none of the tokens, all of them, or some."""
    bench = Bench(
        COMBINATIONS["contrastive"],
        1500,
        temperature=temperature,
        options=options,
        shortlist=LISTED,
        has_grammar=has_grammar,
    )
    way = bench.by_kernels.way(bench.sequences[0])
    assert way.by_kernels
    by_torch = bench.by_torch.way(bench.sequences[0])
    places = [place for place in bench.places if place[1] <= len(place[0])]
    tokens = bench.by_kernels.propose(0, places, way, True)
    assert torch.equal(tokens, bench.by_torch.propose(0, places, by_torch, True))
    assert_same_decisions(bench)


def test_neighbours_change_nothing() -> None:
    """Greedy, seeded, truncated and plausible texts beside each other, and each alone."""
    bench = Bench(COMBINATIONS["linear"], 1500)
    plausible = make_decoding("cos", COMBINATIONS["plausible"])
    kinds: list[dict[str, Any]] = [
        {},
        {"top_p": 0.7, "temperature": 0.7},
        {"temperature": 0.0},
        {"is_seeded": True},
        {"is_seeded": True, "top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3, "bad_words": ((0,),)},
        {"allowed_token_ids": tuple(range(700)), "is_seeded": True},
    ]
    for number, sequence in enumerate(bench.sequences):
        options = {"temperature": 1.0, **kinds[number % len(kinds)]}
        sequence.params = SamplingParams(max_tokens=9, seed=number, **options)
        if number >= len(kinds):
            sequence.decoding = sequence.schedule = plausible
    for is_coupled in (False, True):
        group = [s for s in bench.sequences if s.params.is_coupled is is_coupled]
        way = bench.by_kernels.way(group[0])
        places = [(s, 2 + i) for s in group for i in range(LENGTH)]
        tokens = torch.tensor([s.token_ids[position] for s, position in places])
        together = bench.by_kernels.verify(places, tokens, [LENGTH] * len(group), way)
        drawn = bench.by_kernels.draw(places, way)
        for number in range(len(group)):
            part = slice(number * LENGTH, (number + 1) * LENGTH)
            alone = bench.by_kernels.verify(places[part], tokens[part], [LENGTH], way)
            assert torch.equal(together[number], alone[0])
            assert torch.equal(drawn[part], bench.by_kernels.draw(places[part], way))
        picked = bench.by_torch.verify(
            places, tokens, [LENGTH] * len(group), way._replace(by_kernels=False)
        )
        assert torch.equal(together, picked)


def test_greedy_tokens_are_not_truncated_beside_some_that_are() -> None:
    """What they may ask for has no part in them: members are mixed whole."""
    bench = Bench(COMBINATIONS["weighted"], 40, temperature=0.0, options={"top_k": 1})
    way = bench.by_kernels.way(bench.sequences[0])
    places = bench.places[LENGTH + 1 :]
    alone = bench.by_kernels.draw(places, way)
    params = bench.sequences[0].params
    bench.sequences[0].params = replace(params, temperature=0.7, is_seeded=True)
    assert torch.equal(bench.by_kernels.draw(bench.places, way)[LENGTH + 1 :], alone)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_thread_works_in_memory_of_its_own(
    count: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind what all have together there is something that none of them writes."""
    guards: list[Tensor] = []

    def guarded(size: int) -> Tensor:
        whole = torch.full((2 * size,), 77, dtype=torch.uint8)
        guards.append(whole[size:])
        return whole[:size]

    monkeypatch.setattr("server.engine.row_kernels._scratch", guarded)
    bench = Bench(COMBINATIONS["weighted"], 1500)
    way = bench.by_kernels.way(bench.sequences[0])
    with threads(num_threads):
        bench.by_kernels.draw(bench.places[:count], way)
    assert all((guard == 77).all() for guard in guards)
    assert len(guards) == 1


@pytest.mark.parametrize(
    ("temperature", "options"),
    [(0.0, {}), (1.0, {}), (1.0, {"is_seeded": True}), (1.0, {"top_p": 0.8, "top_k": 9})],
)
@pytest.mark.parametrize("name", ["weighted", "one", "linear", "plausible to the second"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_distribution_gives_no_token(
    name: str, temperature: float, options: Mapping[str, Any], broken: float
) -> None:
    bench = Bench(COMBINATIONS[name], 40, temperature=temperature, options=options)
    rows = bench.scores._store._rows[1]
    way = bench.by_kernels.way(bench.sequences[0])
    # Read from the store, all of them.
    bench.scores._latest[1] = None
    if broken == -torch.inf:
        rows[:] = broken
    else:
        rows[:, 7] = broken
    places = bench.places[:7]
    drawn = bench.by_kernels.draw(places, way)
    if name != "linear" or broken != broken:  # a negative weight makes a token of either infinity
        assert drawn.tolist() == [INVALID] * 7
    expected = bench.by_torch.draw(places, bench.by_torch.way(bench.sequences[0]))
    assert torch.equal(drawn == INVALID, expected == INVALID)
    assert temperature or torch.equal(drawn, expected)
    assert bench.by_kernels.propose(1, places, way, False).tolist() == [INVALID] * 7
    fine = bench.by_kernels.propose(0, places, way, False)
    assert INVALID not in fine.tolist()


@pytest.mark.parametrize("verification", ["token", "block"])
def test_a_proposal_from_what_is_no_distribution_ends_its_window(verification: str) -> None:
    """All first tokens are model 0's, and the target is model 1's."""
    bench = Bench(COMBINATIONS["one"], 40, verification=verification)
    bench.scores._latest[0] = None
    bench.scores._store._rows[0][:] = torch.nan
    found = bench.verify(bench.by_kernels)
    assert found.tolist() == [[0, INVALID]] * NUM_WINDOWS
    assert torch.equal(found, bench.verify(bench.by_torch))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["weighted", "one", "linear"])
def test_no_change_makes_a_forbidden_token_possible(name: str, temperature: float) -> None:
    """Where the only one that is allowed has no probability, and the other came before."""
    options = {"allowed_token_ids": (3,), "repetition_penalty": 0.1}
    bench = Bench(COMBINATIONS[name], 40, temperature=temperature, options=options)
    for model in range(3):
        bench.scores._latest[model] = None
        rows = bench.scores._store._rows[model]
        rows[:] = -1.0
        rows[:, 3] = -torch.inf
    places = [(sequence, 2) for sequence in bench.sequences]
    for decider in (bench.by_kernels, bench.by_torch):
        way = decider.way(bench.sequences[0])
        assert decider.draw(places, way).tolist() == [INVALID] * NUM_WINDOWS


def test_a_token_that_rounding_alone_rejects_is_replaced_all_the_same() -> None:
    """By one of the target, which is the proposal but for rounding: it leaves nothing over."""
    bench = Bench(COMBINATIONS["weighted"], 3, temperature=0.9)
    kernels = bench.by_kernels._kernels
    assert kernels is not None
    for model in range(3):
        bench.scores._latest[model] = None
    most = torch.full((len(bench.pending),), 1 - 2.0**-24)
    num_rejected = 0
    for _ in range(50):
        rows = torch.randn(bench.scores._store._rows[0].shape, generator=bench.random).bfloat16()
        for model in range(3):
            bench.scores._store._rows[model][:] = rows
        lengths = [LENGTH] * NUM_WINDOWS
        found = kernels.verify(bench.pending, bench.tokens, lengths, "token", (most, most))
        rejected = found[found[:, 0] < LENGTH]
        num_rejected += len(rejected)
        assert INVALID not in rejected[:, 1].tolist()
    assert num_rejected > 10


@pytest.mark.parametrize("verification", ["token", "block"])
def test_what_was_looked_up_is_never_recovered(verification: str) -> None:
    bench = Bench(COMBINATIONS["contrastive"], 5, verification=verification)
    for sequence in bench.sequences:
        tail = sequence.token_ids[2:]
        sequence.recover(0)
        sequence.num_verified = 2
        del sequence.token_ids[2:]
        sequence.look_up(tail)
    targets = bench.rows(bench.distributions.target(bench.pending))
    found, expected = bench.verify(bench.by_kernels), bench.verify(bench.by_torch)
    assert found[:, 0].tolist() == expected[:, 0].tolist()
    for window, (count, recovered) in enumerate(found.tolist()):
        if count < LENGTH:
            row = window * LENGTH + count
            assert recovered != int(bench.tokens[row])
            assert targets[row, recovered] > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0, "top_p": 0.5, "is_seeded": True},
        {"temperature": 0.7},
        {"logprobs": 3},
        {"is_seeded": True},
        {"top_p": 0.9, "top_k": 4, "min_p": 0.1},
        {"min_tokens": 2, "repetition_penalty": 1.2, "presence_penalty": 0.1},
        {"logit_bias": ((1, 2.0),), "allowed_token_ids": (1,), "bad_words": ((1,),)},
    ],
)
def test_kernels_take_what_they_know(options: dict[str, object]) -> None:
    bench = Bench(COMBINATIONS["one"], 3)
    decoding = make_decoding("cos", COMBINATIONS["contrastive"])
    params = SamplingParams(max_tokens=4, **options)  # type: ignore[arg-type]
    sequence = Sequence.start("s", [0], params, decoding)
    assert bench.by_kernels.way(sequence).by_kernels


def test_an_early_end_of_a_grammar_is_left_to_torch() -> None:
    bench = Bench(COMBINATIONS["one"], 3, has_grammar=True)
    (sequence, *_) = bench.sequences
    assert bench.by_kernels.way(sequence).by_kernels
    sequence.params = SamplingParams(max_tokens=4, min_tokens=2)
    assert not bench.by_kernels.way(sequence).by_kernels


def kernels_for(wanted: CpuKernels, dtype: torch.dtype = torch.float32) -> RowKernels | None:
    runners = [TableRunner(TableLM(number)) for number in range(2)]
    runners[1].dtype = dtype
    store = ScoreStore(1, 4, 3, [torch.float32] * 2, [CPU] * 2)
    scores, strategies = Scores(runners, store), Strategies(SharedCoins(0))
    return find_kernels(runners, scores, strategies, frozenset(), wanted)


def test_kernels_are_used_where_they_can_be() -> None:
    assert kernels_for("auto") is not None
    assert kernels_for("on", torch.bfloat16) is not None
    assert kernels_for("off") is None
    assert kernels_for("auto", torch.float16) is None


def test_kernels_that_decide_wrongly_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(*arguments: object) -> Tensor:
        return torch.zeros(2, 2, dtype=torch.int64)

    monkeypatch.setattr("server.engine.row_kernels._decide", wrong)
    assert kernels_for("auto") is None
    assert "kernels fail: decided [[[0, 0], [0, 0]]" in caplog.text
    with pytest.raises(ConfigError, match="cpu_kernels: on, but they fail here: decided"):
        kernels_for("on")

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from server.decoding.rng import exponentials
from server.decoding.verify import (
    INVALID,
    Verdict,
    pick,
    sample,
    verdicts,
    verify,
    verify_picks,
)
from tests.support.exact import Floats


def oracle_sample(probs: Floats, u: float) -> int:
    total, below = probs.sum(), 0.0
    for token, p in enumerate(probs):
        below += p
        if p > 0 and below > u * total:
            return token
    return int(np.flatnonzero(probs)[-1])


def decide(rule, r, g, tokens, lengths, accept_u, recover_u) -> list[Verdict]:
    decisions = rule(r, g, torch.tensor(tokens), lengths, accept_u, recover_u)
    return verdicts(decisions.tolist(), lengths)


def oracle_verify(r, g, tokens, lengths, accept_u, recover_u):
    """The plain loop: one window after another, one token after another."""
    expected, row = [], 0
    for length in lengths:
        verdict = Verdict(length, None)
        for i in range(row, row + length):
            token = tokens[i]
            if accept_u[i] >= min(1.0, r[i][token] / g[i][token]):
                residual = np.maximum(r[i] - g[i], 0)
                verdict = Verdict(i - row, oracle_sample(residual, recover_u[i]))
                break
        expected.append(verdict)
        row += length
    return expected


def random_rows(rng: np.random.Generator, count: int, zero_share: float) -> Floats:
    rows = rng.random((count, 7)) * (rng.random((count, 7)) > zero_share)
    rows[np.arange(count), rng.integers(7, size=count)] += 0.3
    rows /= rows.sum(1, keepdims=True)
    return rows


def test_vectorised_equals_the_plain_loop() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        lengths = rng.integers(1, 5, size=rng.integers(1, 6)).tolist()
        count = sum(lengths)
        r, g = random_rows(rng, count, 0.4), random_rows(rng, count, 0.4)
        tokens = [int(rng.choice(7, p=row)) for row in g]
        accept_u, recover_u = rng.random(count) * 0.999, rng.random(count) * 0.999
        tensors = [torch.tensor(x, dtype=torch.float32) for x in (r, g, accept_u, recover_u)]
        decided = decide(verify, tensors[0], tensors[1], tokens, lengths, tensors[2], tensors[3])
        assert decided == oracle_verify(r, g, tokens, lengths, accept_u, recover_u)


def test_equal_distributions_always_accept_and_disjoint_never() -> None:
    u = torch.tensor([0.0, 1 - 2.0**-24])
    p = torch.tensor([[0.25, 0.75], [0.25, 0.75]])
    assert decide(verify, p, p, [0, 1], [2], u, u) == [Verdict(2, None)]
    other = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    mine = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert decide(verify, other, mine, [0, 0], [1, 1], u, u) == [Verdict(0, 1), Verdict(0, 1)]


def test_sampling_never_picks_a_token_without_mass() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.0]]).repeat(2, 1)
    assert sample(probs, torch.tensor([0.0, 1 - 2.0**-24])).tolist() == [1, 2]
    tiny = torch.full((1, 50000), 1e-9)
    tiny[0, 0], tiny[0, -1] = 1.0, 0.0
    assert sample(tiny, torch.tensor([1 - 2.0**-24]))[0] < 49999


def test_rows_that_are_no_distribution_are_invalid() -> None:
    rows = torch.tensor([[0.0, 0.0], [torch.nan, 0.5], [0.5, torch.inf], [0.5, 0.5]])
    u = torch.full((4,), 0.3)
    assert sample(rows, u).tolist() == [INVALID, INVALID, INVALID, 0]
    good = torch.tensor([[0.5, 0.5]] * 4)
    decided = decide(verify, rows, good, [0, 0, 0, 0], [1, 1, 1, 1], u * 3, u)
    assert [v.recovered for v in decided[1:2]] == [INVALID]
    assert decided[0].recovered == INVALID


def test_picks_follow_the_law() -> None:
    probs = torch.tensor([0.5, 0.0, 0.2, 0.3])
    noise = exponentials(range(20_000), [5] * 20_000, 4, torch.device("cpu"))
    counts = np.bincount(pick(probs.expand(20_000, 4), noise), minlength=4)
    assert counts[1] == 0
    assert stats.chisquare(counts[[0, 2, 3]], 20_000 * probs[[0, 2, 3]].numpy()).pvalue > 1e-3


def test_picks_of_like_distributions_mostly_agree() -> None:
    r, g = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    noise = exponentials(range(5_000), [5] * 5_000, 3, torch.device("cpu"))
    picks = [pick(p.expand(5_000, 3), noise).tolist() for p in (r, g)]
    agreed = np.mean([a == b for a, b in zip(*picks, strict=True)])
    overlap = float(torch.minimum(r, g).sum())
    assert overlap / (2 - overlap) < agreed <= overlap + 0.02


def test_draws_from_rows_of_many_parts() -> None:
    """Of 128 tokens each; some have no mass, and the last is not whole."""
    rng = np.random.default_rng(4)
    for size in (127, 128, 129, 500, 1000):
        probs = rng.random((60, size)) * (rng.random((60, size)) > 0.9)
        probs[:, 128:384] = 0
        probs[np.arange(60), rng.integers(min(size, 128), size=60)] += 0.01
        uniforms = rng.random(60, dtype=np.float32)
        drawn = sample(torch.from_numpy(probs).float(), torch.from_numpy(uniforms))
        rows = probs.astype(np.float32).astype(np.float64)
        assert drawn.tolist() == [oracle_sample(*row) for row in zip(rows, uniforms, strict=True)]


def test_a_broken_row_has_no_pick() -> None:
    rows = torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [0.0, 1.0]])
    assert pick(rows, torch.ones(3, 2)).tolist() == [INVALID, INVALID, 1]
    logits = torch.tensor([[-torch.inf, -torch.inf], [torch.nan, 1.0], [-5.0, -7.0]])
    assert pick(logits).tolist() == [INVALID, INVALID, 0]


def test_windows_may_be_shorter_than_what_was_decided() -> None:
    """As where a proposer turned out to have had nothing to propose."""
    decided = [[3, 7], [2, 7], [1, 5]]
    assert verdicts(decided, [2, 2, 2]) == [Verdict(2, None), Verdict(2, None), Verdict(1, 5)]


def test_coupled_windows_end_at_the_first_difference() -> None:
    picks, tokens = torch.tensor([[1, 2, 3, 4, 5, INVALID], [1, 2, 3, 9, 5, 6]])
    lengths = [3, 2, 1]
    decisions = verify_picks(picks, tokens, lengths)
    assert verdicts(decisions.tolist(), lengths) == [
        Verdict(3, None),
        Verdict(0, 4),
        Verdict(0, INVALID),
    ]

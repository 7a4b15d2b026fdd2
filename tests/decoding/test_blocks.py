"""Block verification, enumerated: all drafts, and the tests of a block integrated exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from server.decoding.verify import INVALID, Verdict, block_tests, verify, verify_blocks
from tests.decoding.test_verify import decide, oracle_sample, random_rows
from tests.support.exact import Floats, Law

Draft = tuple[int, ...]
Split = Callable[[Draft], list[int]]  # lengths of the windows that a draft is verified in

VOCAB = 3


class Tree:
    """A random distribution after every prefix, with zeros."""

    def __init__(self, seed: int, depth: int, zero_share: float = 0.2) -> None:
        rng = np.random.default_rng(seed)
        self._rows: dict[Draft, Floats] = {}
        for length in range(depth + 1):
            for prefix in product(range(VOCAB), repeat=length):
                row = rng.random(VOCAB) ** 2 * (rng.random(VOCAB) > zero_share)
                row[rng.integers(VOCAB)] += 0.1
                self._rows[prefix] = row / row.sum()

    def after(self, prefix: Draft) -> Floats:
        return self._rows[prefix]

    def rows(self, draft: Draft, places: range) -> torch.Tensor:
        """float64 [len(places), VOCAB]"""
        return torch.tensor(np.array([self.after(draft[:i]) for i in places]))

    def of(self, path: Draft, given: Draft = ()) -> float:
        """Probability of `path` after `given`."""
        return float(np.prod([self.after((*given, *path[:i]))[path[i]] for i in range(len(path))]))


def output_law(r: Tree, g: Tree, length: int, split: Split, rule: str = "block") -> Law:
    """Of `length` + 1 tokens: a draft of `length` from g, verified window by window, r after it."""
    law: Law = defaultdict(float)

    def go_on(prefix: Draft, mass: float) -> None:
        for rest in product(range(VOCAB), repeat=length + 1 - len(prefix)):
            law[(*prefix, *rest)] += mass * r.of(rest, prefix)

    for draft in product(range(VOCAB), repeat=length):
        mass = g.of(draft)
        if mass == 0:
            continue
        first = 0
        for size in split(draft):
            places = range(first, first + size)
            rows = r.rows(draft, places), g.rows(draft, places)
            tests, carry = odds_by(rule, *rows, draft[first : first + size])
            remaining = mass
            for count in range(size, -1, -1):
                kept = remaining * (tests[count - 1] if count else 1.0)
                remaining -= kept
                if count == size:
                    mass = kept
                    continue
                residual = (carry[count] * rows[0][count] - rows[1][count]).clamp_min(0)
                shares = residual / residual.sum() if kept > 1e-15 else residual * 0
                for token, share in enumerate(shares.tolist()):
                    go_on((*draft[: first + count], token), kept * share)
            first += size
        go_on(draft[:first], mass)
    return law


def odds_by(
    rule: str, r: torch.Tensor, g: torch.Tensor, tokens: Draft
) -> tuple[list[float], torch.Tensor]:
    if rule == "block":
        return block_tests(r, g, torch.tensor(tokens), [len(tokens)])
    return token_tests(r, g, tokens)


def token_tests(
    r: torch.Tensor, g: torch.Tensor, tokens: Draft
) -> tuple[list[float], torch.Tensor]:
    """Token verification in the same terms: the longest prefix that passes, from the end."""
    alone = [min(1.0, float(r[i, t] / g[i, t])) for i, t in enumerate(tokens)]
    # reached[i]: the first i are accepted; exactly i with probability reached[i] - reached[i + 1].
    reached = [float(np.prod(alone[:i])) for i in range(len(tokens) + 1)]
    tests = [
        (reached[i] - after) / (1 - after) if after < 1 else 1.0
        for i, after in zip(range(1, len(tokens) + 1), [*reached[2:], 0.0], strict=True)
    ]
    return tests, torch.ones(len(tokens), dtype=r.dtype)


def deviation(law: Law, r: Tree, length: int) -> float:
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    paths = product(range(VOCAB), repeat=length + 1)
    return max(abs(law.get(path, 0.0) - r.of(path)) for path in paths)


def whole(draft: Draft) -> list[int]:
    return [len(draft)]


def in_pieces(draft: Draft) -> list[int]:
    return [2, len(draft) - 2]


def to_the_first_zero(draft: Draft) -> list[int]:
    """The window ends with token 0: known when the window's last token is."""
    return [draft.index(0) + 1] if 0 in draft else [len(draft)]


def before_the_first_zero(draft: Draft) -> list[int]:
    """The window ends before token 0: known only when the token after it is."""
    size = draft.index(0) if 0 in draft else len(draft)
    return [each for each in (size, len(draft) - size) if each]


@pytest.mark.parametrize("split", [whole, in_pieces, to_the_first_zero])
@pytest.mark.parametrize("seed", range(4))
def test_the_law_is_that_of_the_target(seed: int, split: Split) -> None:
    r, g = Tree(seed, 4), Tree(100 + seed, 4)
    assert deviation(output_law(r, g, 3, split), r, 3) < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_a_window_that_ends_by_a_token_behind_it_is_biased(seed: int) -> None:
    """Deciding token by token has no such condition."""
    r, g = Tree(seed, 4, 0.0), Tree(100 + seed, 4, 0.0)
    assert deviation(output_law(r, g, 3, before_the_first_zero), r, 3) > 1e-5
    assert deviation(output_law(r, g, 3, before_the_first_zero, "token"), r, 3) < 1e-9


def kept(r: Tree, g: Tree, length: int, by: str) -> float:
    """Expected tokens of a draft that are kept."""
    total = 0.0
    for draft in product(range(VOCAB), repeat=length):
        mass = g.of(draft)
        if mass == 0:
            continue
        rows = r.rows(draft, range(length)), g.rows(draft, range(length))
        tests = odds_by(by, *rows, draft)[0]
        for count in range(length, 0, -1):
            total += mass * tests[count - 1] * count
            mass *= 1 - tests[count - 1]
    return total


@pytest.mark.parametrize("seed", range(4))
def test_no_fewer_tokens_are_kept_than_one_by_one(seed: int) -> None:
    r, g = Tree(seed, 5), Tree(100 + seed, 5)
    gains = [kept(r, g, n, "block") - kept(r, g, n, "token") for n in (1, 2, 4)]
    assert gains[0] == pytest.approx(0, abs=1e-12)
    assert 1e-4 < gains[1] < gains[2]


def oracle_blocks(r, g, tokens, lengths, accept_u, recover_u):
    """The plain loop over one window after another."""
    expected, first = [], 0
    for length in lengths:
        count, carry, p = 0, 1.0, 1.0
        for i in range(length):
            row = first + i
            p = min(1.0, p * r[row][tokens[row]] / g[row][tokens[row]])
            test = p
            if i + 1 < length:
                excess = np.maximum(p * r[row + 1] - g[row + 1], 0).sum()
                test = excess / (excess + 1 - p) if excess + 1 - p > 0 else 1.0
            if accept_u[row] < test:
                count, carry = i + 1, p
        if count == length:
            expected.append(Verdict(length, None))
        else:
            row = first + count
            residual = np.maximum(carry * r[row] - g[row], 0)
            expected.append(Verdict(count, oracle_sample(residual, recover_u[row])))
        first += length
    return expected


def test_vectorised_equals_the_plain_loop() -> None:
    rng = np.random.default_rng(4)
    stopped = set()
    for _ in range(300):
        lengths = rng.integers(1, 6, size=rng.integers(1, 6)).tolist()
        count = sum(lengths)
        r, g = random_rows(rng, count, 0.2), random_rows(rng, count, 0.2)
        tokens = [int(rng.choice(7, p=row)) for row in g]
        accept_u, recover_u = rng.random(count) * 0.999, rng.random(count) * 0.999
        tensors = [torch.tensor(x, dtype=torch.float32) for x in (r, g, accept_u, recover_u)]
        given = (*tensors[:2], tokens, lengths, *tensors[2:])
        verdicts = decide(verify_blocks, *given)
        assert verdicts == oracle_blocks(r, g, tokens, lengths, accept_u, recover_u)
        stopped |= {verdict.num_accepted for verdict in verdicts}
        if set(lengths) == {1}:
            assert verdicts == decide(verify, *given)
    assert stopped >= {0, 1, 2, 3, 4}


def test_a_broken_row_is_met_as_often_as_by_tokens() -> None:
    """It ends the block before it, and nothing behind it counts."""
    good = torch.tensor([[0.5, 0.5]] * 4)
    low = torch.zeros(4)
    for row in ([0.0, 0.0], [torch.nan, 0.5], [0.5, torch.inf]):
        target = good.clone()
        target[2] = torch.tensor(row)
        expected = [Verdict(2, INVALID)]
        assert decide(verify_blocks, target, good, [0, 1, 0, 1], [4], low, low) == expected
        skewed = target.clone()
        skewed[0] = torch.tensor([0.25, 0.75])
        tests, carry = block_tests(skewed, good, torch.tensor([0, 1, 0, 1]), [4])
        assert tests[1:] == [0.5, 0.0, 0.0]
        assert carry.tolist()[:3] == [1.0, 0.5, 1.0]


def test_equal_distributions_are_kept_whole_and_disjoint_never() -> None:
    high = torch.full((3,), 1 - 2.0**-24)
    rows = torch.tensor([[0.3, 0.3, 0.4]] * 3)
    assert decide(verify_blocks, rows, rows, [0, 2, 1], [3], high, high) == [Verdict(3, None)]
    other = torch.tensor([[0.0, 0.0, 1.0]] * 3)
    mine = torch.tensor([[0.5, 0.5, 0.0]] * 3)
    low = torch.zeros(3)
    assert decide(verify_blocks, other, mine, [0, 1, 1], [3], low, low) == [Verdict(0, 2)]


@pytest.mark.parametrize("rule", [verify, verify_blocks])
@pytest.mark.parametrize("before", [[], [0.0, 1.0, 0.0]])
def test_what_nobody_gives_anything_to_is_never_accepted(rule, before):
    """Nor behind a token that is rejected for certain: 0 / 0, and 0 times the odds of g = 0."""
    last = [0.5, 0.0, 0.5]
    target = torch.tensor([[0.0, 0.0, 1.0], last] if before else [last])
    proposal = torch.tensor([before, last] if before else [last])
    tokens = [1] * len(target)
    zeros = torch.zeros(len(target))
    (verdict,) = decide(rule, target, proposal, tokens, [len(target)], zeros, zeros + 0.7)
    assert verdict == Verdict(0, 2)

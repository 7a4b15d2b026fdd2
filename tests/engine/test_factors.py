"""What steps of several kinds tell of each other, on a machine whose speed is never known."""

import math
import random

import pytest

from server.engine.factors import Factors

MACHINE, PLAIN, LONG = "machine", "plain", "long"


def make_factors() -> Factors:
    factors = Factors(noise=0.1**2, surprise=3.0)
    factors.add(MACHINE, 0.3**2, 0.3**2, memory=120.0)
    factors.add(PLAIN, 0.1**2, 0.05**2, memory=120.0)
    factors.add(LONG, 0.1**2, 0.1**2, memory=120.0)
    return factors


def beside_plain(factors: Factors) -> float:
    """What the long kind takes beside the plain one."""
    return factors.value([MACHINE, PLAIN, LONG]) / factors.value([MACHINE, PLAIN])


@pytest.mark.parametrize("seed", range(5))
def test_kinds_that_took_turns_are_known_beside_each_other(seed: int) -> None:
    """Some seconds of the one and few steps of the other, while the machine drifts."""
    rng = random.Random(seed)
    factors = make_factors()
    now = 0.0
    for kind, steps in ((LONG, 300), (PLAIN, 16), (LONG, 100), (PLAIN, 16)):
        for _ in range(steps):
            speed = 1.4 + 0.3 * math.sin(now / 9) + rng.gauss(0, 0.05)
            names = [MACHINE, PLAIN, LONG] if kind == LONG else [MACHINE, PLAIN]
            factors.pass_time(0.06)
            factors.observe(names, speed * (1.2 if kind == LONG else 1.0))
            now += 0.06
    assert beside_plain(factors) == pytest.approx(1.2, rel=0.05)


def test_one_kind_alone_says_nothing_of_the_other() -> None:
    factors = make_factors()
    for _ in range(200):
        factors.pass_time(0.05)
        factors.observe([MACHINE, PLAIN, LONG], 1.5)
    assert factors.value([MACHINE, PLAIN, LONG]) == pytest.approx(1.5, rel=0.01)
    # The machine is blamed, as the least certain.
    assert 1.0 <= beside_plain(factors) < 1.08
    assert factors.value([MACHINE]) > 1.35


def test_doubt_falls_with_what_is_seen_and_comes_back() -> None:
    factors = make_factors()
    doubts = [factors.doubt(PLAIN)]
    for _ in range(16):
        factors.observe([MACHINE, PLAIN], 1.3)
        doubts.append(factors.doubt(PLAIN))
    assert doubts[0] == pytest.approx(0.05)
    assert doubts == sorted(doubts, reverse=True)
    assert doubts[-1] < 0.03
    # Other kinds say nothing of how lately this one was seen.
    for _ in range(400):
        factors.pass_time(0.05)
        factors.observe([MACHINE, PLAIN, LONG], 1.3)
    assert 0.05 < factors.doubt(PLAIN) < 0.08
    assert factors.doubt(LONG) < 0.03
    factors.pass_time(1e4)
    assert factors.doubt(PLAIN) == pytest.approx(0.1)
    assert factors.value([MACHINE, PLAIN]) == pytest.approx(1.0)


def test_an_outlier_counts_for_little() -> None:
    factors = make_factors()
    for _ in range(100):
        factors.pass_time(0.05)
        factors.observe([MACHINE, PLAIN], 1.0)
    factors.observe([MACHINE, PLAIN], 50.0)
    assert factors.value([MACHINE, PLAIN]) < 1.1


def test_what_nobody_has_added_is_one() -> None:
    factors = make_factors()
    assert factors.value(["other"]) == 1.0
    factors.add(LONG, 9.0, 9.0, memory=1.0)  # known already
    assert factors.doubt(LONG) == pytest.approx(0.1)


def test_each_is_forgotten_in_its_own_time() -> None:
    factors = make_factors()
    factors.add("lasting", 0.1**2, 0.1**2, memory=12000.0)
    for _ in range(100):
        factors.observe([MACHINE, PLAIN, LONG], 1.2)
        factors.observe([MACHINE, PLAIN, "lasting"], 1.2)
    before = factors.value([LONG]), factors.value(["lasting"])
    assert before[0] == pytest.approx(before[1], rel=0.01)
    factors.pass_time(120.0)
    assert math.log(factors.value([LONG])) == pytest.approx(math.log(before[0]) / math.e)
    assert factors.value(["lasting"]) == pytest.approx(before[1], rel=0.01)
    assert factors.doubt(LONG) > 0.09 > 0.03 > factors.doubt("lasting")

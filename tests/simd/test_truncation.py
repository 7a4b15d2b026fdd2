"""Truncated rows, against sorted ones in float64."""

import itertools

import numpy as np
import pytest

from server.simd import support

if reason := support.missing():
    pytest.skip(f"the kernels cannot run here: {reason}", allow_module_level=True)

from numba import njit

from server.simd import vectors
from server.simd.kernel import Kernel
from server.simd.truncation import NUM_LIMITS, truncate

LIMITS = list(itertools.product([0.0, 1e-3, 0.3], [0, 1, 7, 400, 10**6], [1e-6, 0.3, 0.95, 1.0]))


@njit
def truncating(a, thread, num_threads):
    total = vectors.load_number(a.total)
    vectors.store_number(a.total, truncate(a.row, a.size, total, a.limits, a.room))


KERNEL = Kernel(truncating, dict.fromkeys(("row", "size", "total", "limits", "room"), "q"))


def truncated(row, limits):
    assert len(limits) == NUM_LIMITS
    room = np.empty_like(row)
    found, total = row.copy(), row.sum(keepdims=True)
    arrays = (found, total, np.array(limits, np.float32), room)
    first, *rest = [array.ctypes.data for array in arrays]
    KERNEL.alone(first, len(row), *rest)
    assert total[0] == pytest.approx(found.sum(dtype=np.float64), rel=1e-6)
    return found


def kept(row, min_p, top_k, top_p):
    """Of each weight: is it for certain, and may it be, with what is added up rounded?"""
    exact = row.astype(np.float64)
    exact = np.where(exact >= np.float32(min_p), exact, 0)
    ordered = np.sort(exact)[::-1][: top_k or None]
    before = np.cumsum(ordered) - ordered
    if top_p == 1:
        return [exact >= max(ordered[-1], 1e-45)] * 2
    limits = [np.float32(top_p) * ordered.sum() * (1 + error) for error in (-1e-5, 1e-5)]
    return [exact >= ordered[before < limit].min(initial=1) for limit in limits]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("spread", [0.1, 3.0, 12.0])
@pytest.mark.parametrize("size", [256, 512, 8192])
def test_what_is_kept_is_what_sorting_keeps(size, spread, limits):
    random = np.random.default_rng(size)
    scores = (random.normal(size=size) * spread).astype(np.float32)
    scores[random.random(size) < 0.2] = -np.inf
    row = np.exp(scores - scores.max())
    found = truncated(row, limits)
    certain, possible = kept(row, *limits)
    assert (found[certain] == row[certain]).all()
    assert not found[~possible].any()


def test_ties_stay_together():
    row = np.resize(np.array([1, 0.5, 0.5, 0.25], np.float32), 256)
    for limits in [(0.0, 1, 1.0), (0.0, 64, 1.0), (0.0, 0, 0.1)]:
        assert np.array_equal(truncated(row, limits), np.where(row == 1, row, 0))
    for limits in [(0.0, 65, 1.0), (0.0, 192, 1.0), (0.5, 0, 1.0), (0.0, 0, 0.5)]:
        assert np.array_equal(truncated(row, limits), np.where(row >= 0.5, row, 0))
    assert np.array_equal(truncated(row, (0.0, 193, 1.0)), row)


@pytest.mark.parametrize("limits", [(0.1, 0, 1.0), (0.0, 10**5, 1.0), (0.0, 0, 0.9)])
def test_many_weights_are_added_up_precisely(limits):
    random = np.random.default_rng(0)
    row = (0.7 + 0.001 * random.random(152 << 10)).astype(np.float32)
    row[7] = 1
    truncated(row, limits)


def test_one_is_left_at_least():
    row = np.full(256, 1e-20, np.float32)
    row[3] = 1
    for limits in [(1.0, 0, 1.0), (0.0, 1, 1.0), (0.0, 0, 1e-30)]:
        assert truncated(row, limits).nonzero()[0].tolist() == [3]

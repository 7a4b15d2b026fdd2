"""Vectors and functions of them, against numpy in float64."""

import numpy as np
import pytest
import torch

from server.simd import support

if reason := support.missing():
    pytest.skip(f"the kernels cannot run here: {reason}", allow_module_level=True)

from numba import njit

from server.core.noise import LARGEST
from server.simd import vectors
from server.simd.functions import exp, log1p
from server.simd.kernel import Kernel
from server.simd.vectors import LANES

ONE, TWO = np.float32(1), np.float32(2)


def on_vectors(function, *inputs, lanes=LANES):
    """`function` of vectors, over arrays of any length that is a multiple of `lanes`."""
    count = len(inputs)

    @njit
    def body(a, thread, num_threads):
        for place in range(a.size * thread // num_threads, a.size * (thread + 1) // num_threads):
            offset = place * lanes * 4
            x = vectors.load(a.first + offset, lanes, 32)
            if count == 1:
                y = function(x, x)
            else:
                y = function(x, vectors.load(a.second + offset, lanes, 32))
            vectors.store(a.output + offset, y, 32)

    arrays = [np.ascontiguousarray(x, dtype=np.float32) for x in inputs]
    output = np.empty_like(arrays[0])
    kernel = Kernel(body, {"first": "q", "second": "q", "output": "q", "size": "q"})
    arguments = (arrays[0].ctypes.data, arrays[-1].ctypes.data, output.ctypes.data)
    kernel(*arguments, len(output) // lanes)
    return output


def noise(size, seed=0):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


@njit
def exp_of(x, _):
    return exp(x)


@njit
def log1p_of(x, _):
    return log1p(x)


def test_exp():
    x = np.concatenate([np.linspace(-87, 88, 40000), noise(40000), np.zeros(16)])
    x = x[: len(x) // LANES * LANES].astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(on_vectors(exp_of, x), expected, rtol=2e-7)


def test_exp_beyond_its_range_stays_at_the_ends():
    x = np.repeat(np.array([-3e38, -1000, -87.5, 88.5], np.float32), LANES)
    least, most = np.exp(np.float64(-87)), np.exp(np.float64(88))
    expected = np.repeat([least, least, least, most], LANES)
    np.testing.assert_allclose(on_vectors(exp_of, x), expected, rtol=2e-7)


def test_log1p():
    near_0, near_1 = np.exp2(-np.linspace(1, 32, 40000)), 1 - np.exp2(-np.linspace(1, 24, 40000))
    x = -np.concatenate([np.linspace(1e-6, 1 - 1e-6, 40000), near_0, near_1]).astype(np.float32)
    x = np.maximum(x, -LARGEST).astype(np.float32)
    expected = np.log1p(x.astype(np.float64))
    np.testing.assert_allclose(on_vectors(log1p_of, x), expected, rtol=3e-7)


@pytest.mark.parametrize("lanes", [8, 16, 40, 64])
def test_arithmetic_of_any_length(lanes):
    @njit
    def mixed(x, y):
        z = vectors.multiply_add(x, y, vectors.splat(TWO, lanes))
        z = vectors.larger(z, vectors.subtract(x, y))
        z = vectors.smaller(z, vectors.splat(ONE, lanes))
        return vectors.divide(vectors.add(z, vectors.floor(x)), vectors.splat(TWO, lanes))

    x, y = noise(lanes * 50), noise(lanes * 50, 1)
    expected = (np.minimum(np.maximum(x * y + 2, x - y), 1) + np.floor(x)) / 2
    np.testing.assert_allclose(on_vectors(mixed, x, y, lanes=lanes), expected, atol=1e-6)


@pytest.mark.parametrize("lanes", [8, 16, 40])
def test_sums_and_largest(lanes):
    @njit
    def summed(x, _):
        return vectors.splat(vectors.total(x), lanes)

    @njit
    def highest(x, _):
        return vectors.splat(vectors.largest(x), lanes)

    x = noise(lanes * 20)
    rows = x.reshape(-1, lanes).astype(np.float64)
    sums = on_vectors(summed, x, lanes=lanes).reshape(rows.shape)
    np.testing.assert_allclose(
        sums, np.broadcast_to(rows.sum(1, keepdims=True), rows.shape), atol=1e-5
    )
    most = on_vectors(highest, x, lanes=lanes).reshape(rows.shape)
    assert (most == rows.max(1, keepdims=True)).all()


def test_powers_of_two():
    x = np.resize(np.arange(-126, 128), 16 * 16).astype(np.float32)

    @njit
    def power(x, _):
        return vectors.power_of_two(x)

    assert (on_vectors(power, x) == np.exp2(x.astype(np.float64))).all()


def test_bfloat16_is_rounded_as_torch_rounds():
    x = torch.cat([torch.randn(4000), torch.tensor([1.00390625, 1.01171875, -0.0, 3e38])])
    x = torch.nn.functional.pad(x, (0, -len(x) % LANES))

    @njit
    def body(a, thread, num_threads):
        for place in range(a.size):
            x = vectors.load(a.x + place * LANES * 4, LANES, 32)
            vectors.store(a.halves + place * LANES * 2, x, 16)
            wide = vectors.load(a.halves + place * LANES * 2, LANES, 16)
            vectors.store(a.x + place * LANES * 4, wide, 32)

    expected = x.bfloat16()
    halves = torch.empty_like(expected)
    kernel = Kernel(body, {"x": "q", "halves": "q", "size": "q"})
    kernel.alone(x.data_ptr(), halves.data_ptr(), len(x) // LANES)
    assert torch.equal(halves, expected)
    assert torch.equal(x, expected.float())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_thread_runs_once(threads):
    @njit
    def body(a, thread, num_threads):
        vectors.store_whole(a.seen + thread * 8, thread + 10)
        vectors.store_whole(a.count, num_threads)

    seen, count = torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    kernel = Kernel(body, {"seen": "q", "count": "q"})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernel(seen.data_ptr(), count.data_ptr())
    finally:
        torch.set_num_threads(before)
    assert seen.tolist() == [*range(10, 10 + threads), *[0] * (4 - threads)]
    assert int(count) == threads

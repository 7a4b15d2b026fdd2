"""Kernels divide by the noise that `decoding.rng` gives."""

import pytest
import torch

from server.simd import support

if reason := support.missing():
    pytest.skip(f"the kernels cannot run here: {reason}", allow_module_level=True)

from numba import njit

from server.core.noise import BITS, FACTORS, SHIFTS
from server.decoding import rng
from server.decoding.rng import exponentials, noise_key
from server.simd import vectors
from server.simd.kernel import Kernel
from server.simd.noise import divide_by_noise

VOCAB_SIZE = 49152
ARGUMENTS = dict.fromkeys(("row", "size", "tokens", "first", "second", "largest"), "q")


@njit
def dividing(a, thread, num_threads):
    found = divide_by_noise(a.row, a.size, a.tokens, a.first, a.second)
    vectors.store_number(a.largest, found)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (7, 100), (2**63 - 1, 8191)])
def test_noise_is_that_of_every_device(seed, position):
    expected = exponentials([seed], [position], VOCAB_SIZE, torch.device("cpu"))[0]
    quotients, largest = torch.ones(VOCAB_SIZE), torch.zeros(1)
    kernel = Kernel(dividing, ARGUMENTS)
    arguments = (*noise_key(seed, position), largest.data_ptr())
    kernel.alone(quotients.data_ptr(), VOCAB_SIZE, 0, *arguments)
    torch.testing.assert_close(1 / quotients, expected, rtol=1e-6, atol=0)
    assert largest == quotients.max()
    tokens = torch.randperm(VOCAB_SIZE)[:512].float()
    listed = torch.ones(512)
    kernel.alone(listed.data_ptr(), 512, tokens.data_ptr(), *arguments)
    assert torch.equal(listed, quotients[tokens.long()])


def key_of_most_noise() -> tuple[int, int]:
    """Half a key, and the other half that gives token 0 the largest of uniforms."""
    mask, first = (1 << 32) - 1, 12345
    x = first ^ first >> SHIFTS[0]
    x = x * FACTORS[1] & mask
    x ^= x >> SHIFTS[1]
    wanted = (1 << BITS) - 1
    before = wanted ^ wanted >> SHIFTS[2] ^ wanted >> 2 * SHIFTS[2]
    return first, (before * pow(FACTORS[2], -1, 1 << 32) - x) & mask


def test_noise_is_never_infinite(monkeypatch):
    """Else a token would not be picked even where it is the only one."""
    key = key_of_most_noise()
    monkeypatch.setattr(rng, "noise_key", lambda seed, position: key)
    noise = exponentials([0], [0], 32, torch.device("cpu"))[0]
    assert 16 < noise[0] < 17
    weights, largest = torch.zeros(32), torch.zeros(1)
    weights[0] = 1.0
    Kernel(dividing, ARGUMENTS).alone(weights.data_ptr(), 32, 0, *key, largest.data_ptr())
    torch.testing.assert_close(1 / weights[0], noise[0], rtol=1e-6, atol=0)
    assert largest == weights[0]


def test_what_has_no_weight_is_never_picked():
    weights, largest = torch.zeros(32), torch.full((1,), 9.0)
    Kernel(dividing, ARGUMENTS).alone(weights.data_ptr(), 32, 0, 1, 2, largest.data_ptr())
    assert largest == 0
    assert not weights.any()

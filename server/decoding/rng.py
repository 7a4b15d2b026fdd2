"""Counter-based randomness: a uniform is a pure function of (seed, position, purpose).

So a request's tokens do not depend on its batch, on preemption or on what others do. The mixing
function is splitmix64's finaliser (Steele, Lea & Flood 2014), once for each of the three inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from server.cache.on_device import tensor_on
from server.core.noise import BITS as NOISE_BITS, FACTORS, LARGEST, SHIFTS

_GOLDEN = 0x9E3779B97F4A7C15
_FACTOR_1 = 0xBF58476D1CE4E5B9
_FACTOR_2 = 0x94D049BB133111EB
_MASK, _MASK_32 = (1 << 64) - 1, (1 << 32) - 1
_BITS = 24  # a float32 holds 24 bits exactly, so no uniform rounds up to 1

_FEW = 16  # uniforms that Python computes sooner than tensors


class Purpose(IntEnum):
    """What a uniform is for; no two draws at one position share one."""

    PROPOSE = 1
    ACCEPT = 2
    RECOVER = 3
    DRAW = 4
    COIN = 5
    CHOICE = 6
    NOISE = 7
    ROUND = 8


def uniform(seed: int, position: int, purpose: Purpose) -> float:
    """One number in [0, 1 - 2**-24]; equal to the same entry of `uniforms`."""
    return (_hash(seed, position, purpose) >> (64 - _BITS)) * 2.0**-_BITS


def derive_seed(seed: int, index: int) -> int:
    """Seed of choice `index` of a request, in [0, 2**63); choice 0 keeps the request's own."""
    return seed if index == 0 else _hash(seed, index, Purpose.CHOICE) >> 1


def round_seed(seed: int, num_rejections: int) -> int:
    """Seed of the draws of a text after so many rejections: none of them has been used before."""
    return seed if num_rejections == 0 else _hash(seed, num_rejections, Purpose.ROUND)


def uniforms(
    seeds: Sequence[int], positions: Sequence[int], purpose: Purpose, device: torch.device
) -> Tensor:
    """float32 [len(seeds)] in [0, 1 - 2**-24] on `device`."""
    if len(seeds) <= _FEW:
        numbers = [uniform(*which, purpose) for which in zip(seeds, positions, strict=True)]
        return tensor_on(device, numbers, torch.float32)
    state = _mix(tensor_on(device, [_signed(seed) for seed in seeds]))
    state = _mix(state + tensor_on(device, positions) * _signed(_GOLDEN))
    state = _mix(state + _signed(int(purpose) * _GOLDEN))
    return _shift_right(state, 64 - _BITS).to(torch.float32) * 2.0**-_BITS


def exponentials(
    seeds: Sequence[int], positions: Sequence[int], vocab_size: int, device: torch.device
) -> Tensor:
    """Exp(1) noise for every token of the vocabulary, float32 [len(seeds), vocab_size], above 0.

    A row is a pure function of (seed, position). Tokens are told apart by a 32-bit integer hash
    (`core.noise`): cheap passes over small integers, since a row has as many entries as the
    vocabulary.
    """
    pairs = zip(seeds, positions, strict=True)
    keys = [[_signed32(half) for half in noise_key(*pair)] for pair in pairs]
    first, second = tensor_on(device, keys, torch.int32)[:, :, None].unbind(1)
    factors = [_signed32(factor) for factor in FACTORS]
    x = torch.arange(vocab_size, dtype=torch.int32, device=device) * factors[0] + first
    x ^= _shift_right32(x, SHIFTS[0])
    x *= factors[1]
    x ^= _shift_right32(x, SHIFTS[1])
    x += second
    x *= factors[2]
    x ^= _shift_right32(x, SHIFTS[2])
    x &= (1 << NOISE_BITS) - 1
    # Small values, which decide, keep their relative precision in -log(1 - u).
    u = x.to(torch.float32).add_(0.5).mul_(2.0**-NOISE_BITS).clamp_max_(LARGEST)
    return u.neg_().log1p_().neg_()


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """What a row of `exponentials` is a function of: 32 bits and 32 bits."""
    key = _hash(seed, position, Purpose.NOISE)
    return key & _MASK_32, key >> 32


def _hash(seed: int, position: int, purpose: Purpose) -> int:
    state = _mix_int(seed & _MASK)
    state = _mix_int((state + position * _GOLDEN) & _MASK)
    return _mix_int((state + int(purpose) * _GOLDEN) & _MASK)


def _mix_int(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _FACTOR_1) & _MASK
    x = ((x ^ (x >> 27)) * _FACTOR_2) & _MASK
    return x ^ (x >> 31)


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_FACTOR_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_FACTOR_2)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64; torch's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _shift_right32(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int32."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed32(x: int) -> int:
    """The int32 with the same bits as the low 32 bits of `x`."""
    x &= _MASK_32
    return x - (1 << 32) if x >> 31 else x


def _signed(x: int) -> int:
    """The int64 with the same bits as the low 64 bits of `x`."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy import stats

from server.decoding.rng import Purpose, derive_seed, exponentials, uniform, uniforms

CPU = torch.device("cpu")


def test_scalar_and_tensor_agree() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    places = list(itertools.product(seeds, [0, 1, 2, 999, 2**20]))
    for purpose in Purpose:
        for some in (places, places[:3]):  # few are computed in another way
            tensor = uniforms([s for s, _ in some], [p for _, p in some], purpose, CPU)
            assert tensor.dtype == torch.float32
            assert tensor.tolist() == [uniform(s, p, purpose) for s, p in some]


def test_uniform_and_uncorrelated() -> None:
    """Kolmogorov-Smirnov and neighbour correlation, each p > 1e-4 for these fixed inputs."""
    by_seed = uniforms(range(20000), [7] * 20000, Purpose.ACCEPT, CPU).numpy()
    by_position = uniforms([7] * 20000, range(20000), Purpose.ACCEPT, CPU).numpy()
    other = uniforms([7] * 20000, range(20000), Purpose.RECOVER, CPU).numpy()
    for sample in (by_seed, by_position, other):
        assert 0 <= sample.min() <= sample.max() < 1
        assert stats.kstest(sample, "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(sample[1:], sample[:-1])[0, 1]) < 4 / 20000**0.5
    assert abs(np.corrcoef(by_position, other)[0, 1]) < 4 / 20000**0.5


def test_derived_seeds() -> None:
    assert derive_seed(-5, 0) == -5
    seeds = {derive_seed(seed, index) for seed in range(50) for index in range(1, 50)}
    assert len(seeds) == 50 * 49
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_noise_is_exponential_and_a_function_of_seed_and_position() -> None:
    noise = exponentials([3, 3, 4, 3], [7, 8, 7, 7], 40_000, CPU)
    assert torch.equal(noise[0], noise[3])
    assert noise.min() > 0
    for row in noise[:3]:
        assert stats.kstest(row.numpy(), "expon").pvalue > 1e-3
    correlations = np.corrcoef(noise[:3].numpy())[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 4 / 200
    neighbours = np.corrcoef(noise[0, :-1].numpy(), noise[0, 1:].numpy())[0, 1]
    assert abs(neighbours) < 4 / 200


def test_the_least_noise_falls_on_every_token_alike() -> None:
    least = exponentials(range(40_000), [1] * 40_000, 16, CPU).argmin(-1)
    assert stats.chisquare(least.bincount(minlength=16).numpy()).pvalue > 1e-3
    pairs = least[:-1] * 16 + least[1:]
    assert stats.chisquare(pairs.bincount(minlength=256).numpy()).pvalue > 1e-3

"""What the CPU's kernels do between products, against torch's operations."""

import random

import pytest
import torch

from server.runner.operations import Heads, TorchOperations
from server.simd import support

if reason := support.missing():
    pytest.skip(f"the kernels cannot run here: {reason}", allow_module_level=True)

from server.runner.simd_operations import SimdOperations

ROWS = (0, 1, 5, 300)
PLAIN, OURS = TorchOperations(), SimdOperations(torch.float32)


def close(ours, plain):
    assert ours.dtype == plain.dtype
    tolerance = 1e-5 if plain.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [16, 40, 576])
def test_norms(rows, size):
    weight = torch.randn(size)
    plain, ours = (operations.norm(weight, 1e-5) for operations in (PLAIN, OURS))
    x = torch.randn(rows, size) * torch.logspace(-4, 4, rows)[:, None]
    close(ours(x), plain(x))
    for y in (torch.randn(rows, size), torch.randn(rows, 2 * size).bfloat16()[:, :size]):
        mine, theirs = x.clone(), x.clone()
        close(ours.after_adding(mine, y), plain.after_adding(theirs, y))
        close(mine, theirs)


def test_a_norm_of_nothing_is_nothing():
    norm = OURS.norm(torch.ones(32), 1e-6)
    assert torch.equal(norm(torch.zeros(2, 32)), torch.zeros(2, 32))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [16, 24, 1536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates(rows, size, dtype):
    x = (torch.randn(rows, 2 * size) * 4).to(dtype)
    x[:, :2] = torch.tensor([-200.0, 200.0])
    ours = SimdOperations(dtype).gate(x.clone())
    close(ours, PLAIN.gate(x.clone()))
    if size % 16 == 0:
        wide = SimdOperations(dtype).gate(x.float())
        assert torch.equal(ours, wide), "rounded once, behind everything"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [3, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding(rows, size, dtype):
    x, y = torch.randn(rows, size), torch.randn(rows, 2 * size).to(dtype)[:, :size]
    mine, theirs = x.clone(), x.clone()
    OURS.add(mine, y)
    PLAIN.add(theirs, y)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rows", [1, 300])
def test_products_are_given_sixteen_bits(rows):
    """Rounded as torch would round them before the product."""
    weight, x = torch.randn(64), torch.randn(rows, 64)
    exact = OURS.norm(weight, 1e-5)(x)
    rounded = SimdOperations(torch.bfloat16).norm(weight, 1e-5)(x)
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dim", [8, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
def test_rotations(rows, dim, dtype, given, normed):
    norm = torch.randn(5, dim) if normed else None
    heads = Heads(num_heads=4, num_kv_heads=1, dim=dim, norm=norm, eps=1e-6, dtype=dtype)
    angles = torch.rand(rows, 1, dim // 2) * 6
    cos = torch.cat([angles.cos()] * 2, -1)
    sin = torch.cat([-angles.sin(), angles.sin()], -1)
    x = torch.randn(rows, 6, dim).to(given)
    plain = PLAIN.rotation(heads)(x.float(), cos, sin)
    ours = OURS.rotation(heads)(x.clone(), cos, sin)
    for mine, theirs in zip(ours, plain, strict=True):
        close(mine, theirs)


def test_rows_do_not_depend_on_each_other():
    """Nor on threads: to the last bit."""
    rng = random.Random(0)
    norm, x = OURS.norm(torch.randn(64), 1e-5), torch.randn(700, 64)
    gate = torch.randn(700, 128)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    normed, gated = norm(x), OURS.gate(gate)
    torch.set_num_threads(before)
    for row in rng.sample(range(700), 20):
        assert torch.equal(norm(x[row : row + 1])[0], normed[row])
        assert torch.equal(OURS.gate(gate[row : row + 1])[0], gated[row])

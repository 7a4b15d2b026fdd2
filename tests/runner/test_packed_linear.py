"""16-bit storage changes no weight, and what it would change keeps 32 bits."""

import math

import pytest
import torch
from torch import nn

from server.runner import packed_linear
from server.runner.packed_linear import (
    BFloat16Linear,
    Float32Linear,
    HalfEmbedding,
    PackedLinear,
    PackingReport,
    half_exponent,
    is_exact,
    multiplies_bfloat16,
    pack_weights,
    padded_rows,
)
from tests.support.tiny_models import make_model


def exact_linear(bias=True):
    linear = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    linear.weight.copy_(linear.weight.half())
    return linear


@pytest.mark.parametrize("kind", [PackedLinear, Float32Linear])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (1, 7, 24), (1, 0, 24), (3, 11, 24)])
def test_packed_equals_plain(kind, bias, shape):
    linear = exact_linear(bias)
    x = torch.randn(shape)
    torch.testing.assert_close(kind(linear)(x), linear(x), rtol=1e-5, atol=1e-6)


def test_thirty_two_bits_are_kept():
    """float16 and bfloat16 would drop what tells the rows apart."""
    linear = nn.Linear(24, 40, bias=False).requires_grad_(False)
    linear.weight.fill_(1.0)
    linear.weight[1] += 2**-20
    output = Float32Linear(linear)(torch.full((5, 24), 0.5))
    torch.testing.assert_close(output[:, 1] - output[:, 0], torch.full((5,), 12 * 2.0**-20))


def test_a_kernel_serves_many_numbers_of_rows():
    """Each costs memory: numbers of rows up to 512 are fewer than forty to oneDNN."""
    padded = [padded_rows(num_rows) for num_rows in range(1, 513)]
    assert padded[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(n <= p <= 1.25 * n for n, p in enumerate(padded, start=1))
    assert padded == sorted(padded)
    assert len(set(padded)) == 8 + 4 * 6
    assert padded_rows(0) == 0


@pytest.mark.parametrize("num_rows", [8, 9, 11, 33])
def test_rows_that_fill_up_change_no_other(num_rows):
    linear = Float32Linear(nn.Linear(24, 40).requires_grad_(False))
    x = torch.randn(40, 24)
    torch.testing.assert_close(linear(x[:num_rows]), linear(x)[:num_rows])


needs_bfloat16 = pytest.mark.skipif(
    not multiplies_bfloat16(), reason="this processor has no bfloat16 instructions"
)


def bfloat16_linear(bias=True):
    return nn.Linear(24, 40, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 24), (8, 24), (9, 24), (1, 70, 24), (1, 0, 24)])
def test_bfloat16_sums_in_float32_and_rounds_once(bias, dtype, shape):
    """Few rows and many go through different kernels."""
    linear = bfloat16_linear(bias)
    x = torch.randn(shape).bfloat16().to(dtype)
    ours = BFloat16Linear(linear)(x)
    exact = nn.functional.linear(x.float(), linear.weight.float())
    if bias:
        exact += linear.bias.float()
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), exact, rtol=2**-8, atol=1e-6)


@needs_bfloat16
@pytest.mark.parametrize("num_rows", [3, 30])
def test_bfloat16_beyond_float16(num_rows):
    linear = bfloat16_linear(bias=False)
    linear.weight[2, 3] = 2.0**40
    packed = BFloat16Linear(linear)
    assert packed.num_copies == 1
    x = torch.randn(num_rows, 24).bfloat16()
    torch.testing.assert_close(packed(x), linear(x), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("value", [1e-9, 2.0**40, 70000.0, 1.0 + 2**-20, math.nan])
def test_what_float16_cannot_hold_beside_ones(value):
    weight = torch.ones(3, 3)
    assert is_exact(weight)
    assert half_exponent(weight) == 0
    weight[1, 1] = value
    assert not is_exact(weight)
    assert half_exponent(weight) is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("power", [-40, -12, -7, 3, 30])
def test_weights_from_bfloat16_are_float16_times_a_power_of_two(power, bias):
    """To the last bit what a weight gives that float16 holds as it is."""
    plain, shifted = (exact_linear(bias) for _ in range(2))
    plain.weight.copy_(torch.randn(40, 24).bfloat16().clamp(-2, 2))
    plain.weight[0, :3] = torch.tensor([2.0, 2.0**-16, -(2.0**-17)])
    shifted.weight.copy_(plain.weight * 2.0**power)
    if bias:
        shifted.bias.copy_(plain.bias * 2.0**power)
    exponent = half_exponent(shifted.weight)
    assert exponent is not None
    x = torch.randn(5, 24)
    ours = PackedLinear(shifted, exponent)(x)
    assert torch.equal(ours, PackedLinear(plain)(x) * 2.0**power)


@pytest.mark.parametrize("value", [2.0**80, 2.0**-80, 2.0**-140])
def test_powers_near_the_end_of_float32_are_not_taken(value):
    assert half_exponent(torch.full((3, 3), value)) is None


def test_nothing_is_lost_beside_what_is_much_larger():
    assert half_exponent(torch.tensor([2.0**60, 2.0**-120])) is None


@pytest.mark.parametrize("has_kernel", [True, False])
def test_only_exact_layers_are_kept_in_sixteen_bits(has_kernel, monkeypatch):
    monkeypatch.setattr(packed_linear, "_multiplies_float32", lambda: has_kernel)
    model = make_model().requires_grad_(False)
    layer = model.model.layers[0]
    layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight.half())
    report = pack_weights(model)
    assert isinstance(layer.mlp.up_proj, PackedLinear)
    assert type(layer.mlp.gate_proj) is (Float32Linear if has_kernel else nn.Linear)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert report.packed == 32 * 64
    assert report.considered > 10 * report.packed
    assert report.saved == 2 * 32 * 64


@pytest.mark.parametrize("has_kernel", [True, False])
def test_a_head_laid_out_in_float32_no_longer_shares_the_table(has_kernel, monkeypatch):
    monkeypatch.setattr(packed_linear, "_multiplies_float32", lambda: has_kernel)
    model = make_model("qwen2").requires_grad_(False)
    table = model.model.embed_tokens.weight
    report = pack_weights(model)
    assert report.packed == 0
    assert model.model.embed_tokens.weight is table
    assert report.saved == (-table.nbytes if has_kernel else 0)


@torch.no_grad()
def test_tied_table_is_kept_in_sixteen_bits():
    model = make_model("qwen2").requires_grad_(False)
    table = model.model.embed_tokens.weight
    table.copy_(table.half())
    plain = model.model.embed_tokens(torch.tensor([[3, 0, 3]]))
    report = pack_weights(model)
    assert report.saved == 2 * report.packed - 2 * table.numel(), "the head has a copy of its own"
    embedding = model.model.embed_tokens
    assert isinstance(embedding, HalfEmbedding)
    assert isinstance(model.lm_head, PackedLinear)
    assert not any(parameter.shape == table.shape for parameter in model.parameters())
    assert model.dtype == torch.float32
    assert torch.equal(embedding(torch.tensor([[3, 0, 3]])), plain)


@needs_bfloat16
@torch.no_grad()
def test_a_bfloat16_model_is_packed_for_both_kernels():
    model = make_model("qwen2").bfloat16().requires_grad_(False)
    table = model.model.embed_tokens.weight
    ids = torch.tensor([[3, 0, 3, 9, 1, 7, 7, 2, 11, 5]])
    plain = model(ids).logits
    report = pack_weights(model)
    assert report.packed == report.considered
    assert report.saved == -2 * report.packed - 2 * table.numel(), "a second copy; and of the table"
    assert isinstance(model.lm_head, BFloat16Linear)
    assert model.model.embed_tokens.weight is table
    for num_tokens in (4, 10):
        logits = model(ids[:, :num_tokens]).logits
        assert logits.dtype == torch.bfloat16
        scale = float(plain.float().abs().max())
        torch.testing.assert_close(logits, plain[:, :num_tokens], rtol=0, atol=0.03 * scale)


def test_quantised_kinds_are_left_alone():
    class Quantised(nn.Linear):
        pass

    class Scaled(nn.Embedding):
        pass

    model = nn.Sequential(Quantised(4, 4), Scaled(4, 4))
    assert pack_weights(model) == PackingReport(0, 0)
    assert [type(module) for module in model] == [Quantised, Scaled]

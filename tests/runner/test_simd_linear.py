"""Linear layers in the CPU's kernels, against torch in float64."""

import pytest
import torch

from server.runner.packed_linear import PackingReport, multiplies_in_kernels, pack_linear
from server.simd import support

if reason := support.missing():
    pytest.skip(f"the kernels cannot run here: {reason}", allow_module_level=True)

from server.runner import simd_linear
from server.runner.simd_linear import SimdLinear

TYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if multiplies_in_kernels(dtype)]
if not TYPES:
    pytest.skip("this processor's registers are too few", allow_module_level=True)
KINDS = [torch.float32, torch.float16, *TYPES[1:]]


def exact(x, weight, bias=None):
    if weight.dtype == torch.bfloat16:
        x = x.bfloat16()
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


def assert_near(ours, expected):
    assert ours.dtype == torch.float32
    scale = expected.abs().max() if expected.numel() else 1.0
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=5e-6 * float(scale))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 21, 100])
def test_any_number_of_rows(rows, dtype):
    weight, x = torch.randn(48, 64).to(dtype), torch.randn(rows, 64)
    assert_near(SimdLinear(weight, None).product(x), exact(x, weight))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 2), (1, 34), (40, 30), (1030, 576)])
def test_any_size(outputs, inputs, dtype):
    weight, bias, x = (
        torch.randn(outputs, inputs).to(dtype),
        torch.randn(outputs),
        torch.randn(7, inputs),
    )
    layer = SimdLinear(weight, bias.to(dtype))
    assert_near(layer.product(x), exact(x, weight, bias.to(dtype)))
    assert layer.product(x).is_contiguous()


@pytest.mark.parametrize("dtype", KINDS)
def test_rows_that_fill_the_cache(dtype):
    weight, x = torch.randn(32, 4096).to(dtype), torch.randn(150, 8192)[:, :4096]
    assert_near(SimdLinear(weight, None).product(x), exact(x, weight))


@pytest.mark.parametrize("dtype", KINDS)
def test_a_row_gives_the_same_whatever_stands_beside_it(dtype):
    """To the last bit, and by any number of threads."""
    layer, x = SimdLinear(torch.randn(80, 576).to(dtype), None), torch.randn(41, 576)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    together = layer.product(x)
    torch.set_num_threads(before)
    for count in (1, 2, 3, 5, 9, 16, 17, 33):
        assert torch.equal(layer.product(x[-count:]), together[-count:])


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("rows", [9, 12, 14, 16, 17, 28, 48, 60, 200])
def test_one_block_or_two_at_once_give_the_same(monkeypatch, rows, dtype):
    """To the last bit: which of them is faster here, a clock says."""
    layer, x = SimdLinear(torch.randn(80, 576).to(dtype), None), torch.randn(rows, 576)
    found = []
    for most_single in (simd_linear._FEW_ROWS, simd_linear._ANY_NUMBER):
        monkeypatch.setattr(simd_linear, "_most_single", lambda form, most=most_single: most)
        found.append(layer.product(x))
    assert torch.equal(*found)
    assert_near(found[0], exact(x, layer_weight(layer)))


def layer_weight(layer):
    """As it was given."""
    return layer.product(torch.eye(layer.in_features)).T.to(layer.packed.dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_as_a_module_it_gives_the_type_it_takes(dtype):
    layer = SimdLinear(torch.randn(32, 16).to(dtype), None)
    for given in (torch.float32, torch.bfloat16):
        output = layer(torch.randn(2, 3, 16).to(given))
        assert output.shape == (2, 3, 32)
        assert output.dtype == given


def make_linear(dtype, inputs=32, scale=1.0):
    linear = torch.nn.Linear(inputs, 48, dtype=torch.float32)
    linear.weight.data = (linear.weight.data.bfloat16() * scale).to(dtype)
    linear.bias.data = linear.bias.data.to(dtype)
    return linear.requires_grad_(False)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-20])
def test_packing_loses_nothing(dtype, scale):
    """Weights beyond float16's range, too: they are float16 numbers times a power of two."""
    linear, report = make_linear(dtype, scale=scale), PackingReport()
    packed = pack_linear(linear, report, kernels=True)
    assert isinstance(packed, SimdLinear)
    assert packed.packed.itemsize == 2
    saved = 2 if dtype == torch.float32 else 0
    assert report == PackingReport(32 * 48, 32 * 48, saved * 32 * 48)
    x = torch.randn(5, 32)
    assert_near(packed.product(x), exact(x, linear.weight, linear.bias))


def test_weights_of_many_digits_keep_32_bits():
    linear, report = make_linear(torch.float32), PackingReport()
    linear.weight[0, 0] = 1 + 2**-20
    packed = pack_linear(linear, report, kernels=True)
    assert isinstance(packed, SimdLinear)
    assert report == PackingReport(0, 32 * 48, 0)
    x = torch.randn(5, 32)
    assert_near(packed.product(x), exact(x, linear.weight, linear.bias))


@pytest.mark.parametrize("dtype", TYPES)
def test_an_odd_number_of_inputs_is_left_to_libraries(dtype):
    linear = make_linear(dtype, inputs=33)
    packed = pack_linear(linear, PackingReport(), kernels=True)
    assert not isinstance(packed, SimdLinear)
    assert type(packed) is type(pack_linear(linear, PackingReport()))

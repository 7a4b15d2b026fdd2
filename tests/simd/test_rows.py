"""Scores and weighted sums of attention, against torch."""

import pytest
import torch

from server.simd import support

if reason := support.missing():
    pytest.skip(f"the kernels cannot run here: {reason}", allow_module_level=True)

from numba import njit

from server.simd import rows
from server.simd.kernel import Kernel
from server.simd.vectors import LANES

LENGTHS = (8, 16, 40, 64, 80, 256)
COUNTS = (1, 3, 7)


def make_table(length, bits):
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    return torch.randn(100, length).to(dtype), torch.randint(100, (LANES,))


@pytest.mark.parametrize(("count", "bits"), [*((count, 32) for count in COUNTS), (COUNTS[1], 16)])
@pytest.mark.parametrize("length", LENGTHS)
def test_scores(length, count, bits):
    score = rows.scoring(count, length, bits)

    @njit
    def body(a, thread, num_threads):
        score(a.queries, a.table, length * bits // 8, a.numbers, a.output, 3 * LANES * 4)

    table, numbers = make_table(length, bits)
    queries = torch.randn(count, length).to(table.dtype)
    output = torch.zeros(count, 3, LANES)
    kernel = Kernel(body, dict.fromkeys(("queries", "table", "numbers", "output"), "q"))
    kernel.alone(queries.data_ptr(), table.data_ptr(), numbers.data_ptr(), output.data_ptr())
    expected = queries.float() @ table[numbers].float().t()
    torch.testing.assert_close(output[:, 0], expected, rtol=1e-5, atol=1e-4)
    assert not output[:, 1:].any()


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("count", COUNTS)
def test_weighted_sums(count, length, bits):
    """Rows that are not asked for may hold anything."""
    weigh = rows.adding(count, length, bits)

    @njit
    def body(a, thread, num_threads):
        size = length * bits // 8
        weigh(a.weights, 2 * LANES * 4, a.begin, a.end, a.table, size, a.numbers, a.sums)

    kernel = Kernel(
        body, dict.fromkeys(("weights", "begin", "end", "table", "numbers", "sums"), "q")
    )
    for begin, end in ((0, LANES), (2, 7), (5, 5), (9, 3)):
        table, _ = make_table(length, bits)
        numbers = torch.randperm(100)[:LANES]
        asked = torch.zeros(LANES, dtype=torch.bool)
        asked[begin:end] = True
        table[numbers[~asked]] = torch.nan
        weights, sums = torch.rand(count, 2, LANES), torch.randn(count, length)
        expected = sums + weights[:, 0, asked] @ table[numbers[asked]].float()
        addresses = (table.data_ptr(), numbers.data_ptr(), sums.data_ptr())
        kernel.alone(weights.data_ptr(), begin, end, *addresses)
        torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)

"""The Triton kernels against the portable path: compiled where there is a GPU, else kernels.

`tests/conftest.py` chooses the interpreter, which has to be done before Triton is imported.
"""

import importlib

import numpy as np
import pytest
import torch

from server.runner.style import Style
from tests.support import attention_cases
from tests.support.attention_cases import DEVICE, PLAIN, make_case, spoil_others

kernels = pytest.importorskip("server.runner.triton_attention", exc_type=ModuleNotFoundError)


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch):
    """Triton's interpreter keeps bfloat16 as bits and multiplies these as integers."""
    if DEVICE.type == "cuda":
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar.name != "bf16":
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest),
    )


def assert_same(case, style=PLAIN):
    attention_cases.assert_same(kernels, case, style)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("num_tokens", "lengths"),
    [(1, [1]), (1, [150, 3]), (2, [65, 2]), (5, [5, 130])],
)
def test_same_as_portable(num_tokens, lengths, dim, dtype):
    assert_same(make_case(num_tokens, lengths, 16, 4, 2, dim, dtype))


@pytest.mark.parametrize("page_size", [1, 4, 24, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 1)])
def test_page_sizes_and_groups(page_size, heads, kv_heads):
    case = make_case(3, [70, 31], page_size, heads, kv_heads, 64, torch.float32)
    assert_same(case)


@pytest.mark.parametrize("num_tokens", range(1, 10))
def test_every_query_length(num_tokens):
    lengths = [num_tokens, num_tokens + 1, 100]
    assert_same(make_case(num_tokens, lengths, 16, 4, 2, 64, torch.float32))


@pytest.mark.parametrize("splits", [1, 2, 3, 8, 13, 16])
def test_splits(splits, monkeypatch):
    """More splits than tiles leave some of them empty."""
    monkeypatch.setattr(kernels, "num_splits", lambda *_: splits)
    for style in (PLAIN, Style(0.3, 20, 5.0, torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE))):
        case = make_case(4, [4, 40, 150], 16, 4, 2, 64, torch.float32)
        assert_same(case, style)


@pytest.mark.parametrize(
    "style",
    [
        Style(0.2, 0, None, None),
        Style(None, 1, None, None),
        Style(None, 33, None, None),
        Style(None, 0, 4.0, None),
        Style(None, 0, None, torch.tensor([1.0, -2.0, 0.0, 3.0], device=DEVICE)),
        Style(None, 17, 4.0, torch.tensor([1.0, -2.0, 0.0, 3.0], device=DEVICE)),
    ],
    ids=["scale", "window of one", "window", "softcap", "sinks", "all"],
)
def test_styles(style):
    for num_tokens in (1, 5):
        assert_same(make_case(num_tokens, [150, 9], 4, 4, 2, 64, torch.float32), style)


@pytest.mark.parametrize(("dim", "value_dim"), [(8, 8), (80, 80), (96, 64), (256, 256)])
def test_other_head_dimensions(dim, value_dim):
    case = make_case(2, [70], 16, 4, 2, dim, torch.float32, value_dim)
    assert_same(case)


def test_what_lies_in_other_slots_does_not_matter(monkeypatch):
    """A freed page may hold NaN; the table of a sequence may be longer than it is."""
    monkeypatch.setattr(kernels, "num_splits", lambda *_: 2)
    case = make_case(3, [3, 40, 150], 16, 4, 2, 64, torch.float32)
    (group,), queries, store = case
    clean = kernels.attend_group(group, queries, store, 0, PLAIN)
    spoil_others(case)
    assert torch.equal(kernels.attend_group(group, queries, store, 0, PLAIN), clean)


def test_large_groups_are_left_to_the_portable_path():
    (group,), queries, store = make_case(16, [100], 16, 16, 1, 64, torch.float32)
    assert not kernels.supports(group, queries, store, 0, PLAIN)
    assert kernels.supports(group, queries[:, :8], store, 0, PLAIN)
    (group,), queries, store = make_case(17, [100], 16, 4, 4, 64, torch.float32)
    assert not kernels.supports(group, queries, store, 0, PLAIN)


def test_the_longest_spans():
    assert kernels.max_tokens(4, 128, 2) == 16
    assert kernels.max_tokens(16, 128, 2) == 8
    assert kernels.max_tokens(8, 256, 2) == 8
    assert kernels.max_tokens(3, 64, 4) == 16
    assert kernels.max_tokens(8, 80, 4) == 8
    assert kernels.max_tokens(256, 64, 2) == 0


def test_rows_too_large_for_shared_memory_are_left_to_the_portable_path():
    (group,), queries, store = make_case(16, [100], 16, 8, 1, 128, torch.float32)
    assert not kernels.supports(group, queries, store, 0, PLAIN)
    assert kernels.supports(group, queries[:, :4], store, 0, PLAIN)
    assert kernels.supports(group, queries.bfloat16(), store, 0, PLAIN)


def test_few_sequences_are_split_and_many_are_not():
    cpu = torch.device("cpu")
    splits = [kernels.num_splits(batch * 8, 8192, cpu) for batch in (1, 4, 8, 11, 16, 32, 64)]
    assert splits == [16, 8, 4, 3, 2, 1, 1]
    assert kernels.num_splits(8, 512, cpu) == 4
    assert kernels.num_splits(8, 16, cpu) == 1

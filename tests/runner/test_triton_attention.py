"""The Triton kernels against the portable path: compiled where there is a GPU, else kernels.

`tests/conftest.py` chooses the interpreter, which has to be done before Triton is imported.
"""

import importlib
import random

import numpy as np
import pytest
import torch

from server.cache.kv_store import KVStore
from server.runner.attention import attend_group
from server.runner.base import Batch, Span
from server.runner.plan import make_plan
from server.runner.style import Style

kernels = pytest.importorskip("server.runner.triton_attention", exc_type=ModuleNotFoundError)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN = Style(None, 0, None, None)
MAX_LENGTH = 150


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


def make_case(num_tokens, lengths, page_size, heads, kv_heads, dim, dtype, value_dim=None):
    """Queries of one group over a store full of noise, pages in random order."""
    generator = torch.Generator().manual_seed(num_tokens)
    width = -(-MAX_LENGTH // page_size)
    pages = list(range(1, 1 + len(lengths) * width))
    random.Random(0).shuffle(pages)
    spans = tuple(
        Span(pages[i * width : i * width + width], length - num_tokens, [0] * num_tokens, 1)
        for i, length in enumerate(lengths)
    )
    store = KVStore(1 + len(pages), page_size)
    slots = torch.arange(store.num_pages * page_size, device=DEVICE)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    keys = noise(len(slots), kv_heads, dim)
    store.write(0, slots, keys, noise(len(slots), kv_heads, value_dim or dim))
    queries = noise(len(lengths) * num_tokens, heads, 2 * dim)[..., :dim]
    groups = make_plan(Batch(spans), page_size, DEVICE).groups
    return groups, queries, store


def assert_same(case, style=PLAIN):
    groups, queries, store = case
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[queries.dtype]
    for group in groups:
        kv_heads = store.slots(0)[0].shape[1]
        assert kernels.supports(group, queries, kv_heads)
        ours = kernels.attend_group(group, queries[group.rows], store, 0, style)
        plain = attend_group(group, queries[group.rows], store, 0, style)
        assert ours.shape == plain.shape
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours.float(), plain.float(), rtol=tolerance, atol=tolerance)


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


@pytest.mark.parametrize("splits", [1, 2, 8, 16])
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
    lengths = [3, 40, 150]
    groups, queries, store = make_case(3, lengths, 16, 4, 2, 64, torch.float32)
    clean = kernels.attend_group(groups[0], queries, store, 0, PLAIN)
    stale = torch.ones(store.num_pages * 16, dtype=torch.bool, device=DEVICE)
    for length, pages in zip(groups[0].lengths, groups[0].pages, strict=True):
        for position in range(length):
            stale[pages[position // 16] * 16 + position % 16] = False
    for memory in store.slots(0):
        memory[stale] = torch.nan
    spoilt = kernels.attend_group(groups[0], queries, store, 0, PLAIN)
    assert torch.equal(spoilt, clean)


def test_large_groups_are_left_to_the_portable_path():
    groups, queries, _ = make_case(16, [100], 16, 16, 1, 64, torch.float32)
    assert not kernels.supports(groups[0], queries, 1)
    assert kernels.supports(groups[0], queries[:, :8], 1)
    groups, queries, _ = make_case(17, [100], 16, 4, 4, 64, torch.float32)
    assert not kernels.supports(groups[0], queries, 4)


def test_the_longest_spans():
    assert kernels.max_tokens(4, 128, 2) == 16
    assert kernels.max_tokens(16, 128, 2) == 8
    assert kernels.max_tokens(8, 256, 2) == 8
    assert kernels.max_tokens(3, 64, 4) == 16
    assert kernels.max_tokens(8, 80, 4) == 8
    assert kernels.max_tokens(256, 64, 2) == 0


def test_rows_too_large_for_shared_memory_are_left_to_the_portable_path():
    groups, queries, _ = make_case(16, [100], 16, 8, 1, 128, torch.float32)
    assert not kernels.supports(groups[0], queries, 1)
    assert kernels.supports(groups[0], queries[:, :4], 1)
    assert kernels.supports(groups[0], queries.bfloat16(), 1)


def test_few_sequences_are_split_and_many_are_not():
    store = KVStore(2, 16)
    queries = torch.zeros(1, 8, 128, dtype=torch.bfloat16)
    splits = [kernels.num_splits(batch * 8, 512, store, queries) for batch in (1, 8, 32, 64)]
    assert splits == [16, 4, 1, 1]
    assert kernels.num_splits(8, 32, store, queries) == 4
    assert kernels.num_splits(8, 1, store, queries) == 1

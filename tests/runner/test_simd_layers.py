"""Layers as one program give what they give operation by operation, to the last bit."""

import random
from types import SimpleNamespace

import pytest
import torch

from server.cache.kv_store import KVStore
from server.simd import support

if reason := support.missing():
    pytest.skip(f"the kernels cannot run here: {reason}", allow_module_level=True)

from server.runner import simd_attention, simd_layers
from server.runner.base import Batch, Span
from server.runner.llama_body import LlamaBody
from server.runner.torch_runner import TorchRunner
from tests.runner.test_llama_body import SHAPES, randomised
from tests.runner.test_packed_linear import needs_bfloat16
from tests.runner.test_torch_runner import MAX_LENGTH, NUM_SEQUENCES, Schedule, make_tables
from tests.support.threads import threads
from tests.support.tiny_models import VOCAB_SIZE

PAGE_SIZE = 4
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
# The same kernels under a name that no program is written for.
ONE_BY_ONE = SimpleNamespace(**vars(simd_attention))


def make_runner(family, settings, dtype, attention):
    model = randomised(family, **settings).to(dtype)
    body = LlamaBody(model, packed=True, kernels=True)
    store = KVStore(1 + NUM_SEQUENCES * MAX_LENGTH, PAGE_SIZE)
    return TorchRunner("m", model, VOCAB_SIZE, MAX_LENGTH, store, body, 0, attention), body


def has_only_other_heads(settings):
    return bool(settings) and settings.keys() <= {"num_attention_heads", "num_key_value_heads"}


# How many heads there are is the same for numbers of either width.
CASES = [
    pytest.param(family, settings, dtype, marks=needs_bfloat16 if dtype == torch.bfloat16 else ())
    for family, settings in SHAPES
    for dtype in (torch.float32, torch.bfloat16)
    if dtype == torch.float32 or not has_only_other_heads(settings)
]


@pytest.mark.parametrize(("family", "settings", "dtype"), CASES)
def test_same_bits(family, settings, dtype):
    """Ragged packed batches with growth and rollback."""
    ours, body = make_runner(family, settings, dtype, simd_attention)
    if settings.get("hidden_size") == 72:  # no program: both ways are one
        assert body.program is None
        return
    assert body.program is not None
    plain, _ = make_runner(family, settings, dtype, ONE_BY_ONE)
    rng = random.Random(0)
    schedule = Schedule(rng, make_tables(rng, PAGE_SIZE, in_order=False))
    for _ in range(12):
        batch, _ = schedule.next_batch()
        assert torch.equal(ours.forward(batch), plain.forward(batch))


def batch_of(count, kept):
    tokens = [7 * number % VOCAB_SIZE for number in range(count)]
    return Batch((Span(range(1, 20), 0, tokens, kept), Span(range(20, 30), 0, [5, 6, 7], 0)))


def test_rows_that_nobody_wants_leave_keys_and_values():
    ours, _ = make_runner("llama", {}, torch.float32, simd_attention)
    plain, _ = make_runner("llama", {}, torch.float32, ONE_BY_ONE)
    for runner in (ours, plain):
        assert runner.forward(batch_of(40, 0)).shape == (0, VOCAB_SIZE)
    for layer in range(2):
        for mine, theirs in zip(ours.store.slots(layer), plain.store.slots(layer), strict=True):
            assert torch.equal(mine, theirs)
            assert mine[PAGE_SIZE : 40 + PAGE_SIZE].any(-1).all()


def test_memory_and_threads_may_change():
    """Every forward writes to the memory that there is; rooms grow with the rows."""
    runner, _ = make_runner("qwen2", {}, torch.float32, simd_attention)
    expected = runner.forward(batch_of(8, 8))
    more = runner.forward(batch_of(60, 60))
    assert torch.equal(more[:8], expected)
    first = runner.store
    kept = first.slots(0)[0].clone()
    runner.store = KVStore(40, PAGE_SIZE)
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(runner.forward(batch_of(60, 8)), more[52:])
    assert torch.equal(first.slots(0)[0], kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_are_those_under_the_head(dtype):
    runner, body = make_runner("llama", {}, dtype, simd_attention)
    logits = runner.forward(batch_of(9, 5))
    states = runner.run_part(runner.plan(batch_of(9, 5)), body.states)
    assert states.dtype == dtype
    assert torch.equal(body.head(states), logits)


def test_rotations_of_later_positions_are_added(monkeypatch):
    ours, _ = make_runner("llama", {}, torch.float32, simd_attention)
    plain, _ = make_runner("llama", {}, torch.float32, ONE_BY_ONE)
    monkeypatch.setattr(simd_layers, "_LEAST_POSITIONS", 1)
    for count in (3, 8, 9, 60, 5):
        assert torch.equal(ours.forward(batch_of(count, 1)), plain.forward(batch_of(count, 1)))

"""Padded forwards give what unpadded ones give, whatever they stand beside."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from server.cache.kv_store import KVStore
from server.runner.attention_choice import choose_attention
from server.runner.base import Batch, Span
from server.runner.graph_runner import GraphRunner
from server.runner.llama_body import LlamaBody
from server.runner.static_shapes import Shape, Shapes, StaticBuffers
from server.runner.torch_runner import TorchRunner
from server.simd import support
from tests.runner.test_torch_runner import (
    MAX_LENGTH,
    NUM_SEQUENCES,
    Schedule,
    assert_close,
    make_tables,
)
from tests.support.tiny_models import VOCAB_SIZE, make_model

needs_kernels = pytest.mark.skipif(
    support.missing() is not None, reason=f"the CPU's kernels cannot run: {support.missing()}"
)
SHAPES = Shapes.of(NUM_SEQUENCES, 6, 512, 5)


def make_runners(family, page_size):
    """The same model eagerly and padded, each with KV of its own."""
    eager, padded = (
        TorchRunner(
            "tiny",
            make_model(family),
            VOCAB_SIZE,
            MAX_LENGTH,
            KVStore(1 + NUM_SEQUENCES * MAX_LENGTH, page_size),
        )
        for _ in range(2)
    )
    return eager, GraphRunner(padded, SHAPES, capture=False)


@pytest.mark.parametrize(
    ("family", "page_size"),
    [("llama", 1), ("llama", 16), ("mistral", 4), ("gemma2", 4), ("gpt_oss", 4), ("opt", 16)],
)
def test_padded_equals_eager(family, page_size):
    """Ragged batches that grow and roll back; those too long pass through."""
    rng = random.Random(page_size)
    schedule = Schedule(rng, make_tables(rng, page_size, in_order=False))
    eager, padded = make_runners(family, page_size)
    num_padded = 0
    for _ in range(25):
        batch, _ = schedule.next_batch()
        num_padded += SHAPES.find(batch) is not None
        ours, plain = padded.forward(batch), eager.forward(batch)
        assert ours.shape == plain.shape
        if len(plain):
            assert_close(ours, plain)
    assert 5 < num_padded < 25


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_kernels)])
def test_all_rows_are_those_that_are_named(kernels):
    """A padded plan keeps every row and does not say which."""
    model = make_model("llama")
    body = LlamaBody(model, packed=kernels, kernels=kernels)
    short = choose_attention("auto", torch.device("cpu"), pytest.fail, cpu_kernels=kernels)
    store = KVStore(5, 4)
    runner = TorchRunner("tiny", model, VOCAB_SIZE, 16, store, body, short_attention=short)
    buffers = StaticBuffers(Shape(2, 2), 16, 4, torch.device("cpu"))
    buffers.fill(Batch((Span([1], 0, [5, 6], 2), Span([2], 0, [7, 8], 2))))
    plan = buffers.plan()
    assert plan.keep is None
    logits = runner.run(plan)
    assert torch.equal(logits, runner.run(replace(plan, keep=plan.kept_rows())))
    some = torch.tensor([3, 0])
    assert_close(runner.run(replace(plan, keep=some)), logits[some])


def test_padding_touches_no_other_page_but_the_first():
    eager, padded = make_runners("llama", 4)
    tables = make_tables(random.Random(0), 4, in_order=False)
    spans = [Span(tables[0], 0, [5, 6, 7, 8, 9], 5), Span(tables[1], 0, [3], 1)]
    for runner in (eager, padded):
        runner.forward(Batch(tuple(spans)))
    for ours, plain in zip(padded.store.slots(0), eager.store.slots(0), strict=True):
        torch.testing.assert_close(ours[4:], plain[4:])
        assert ours.isfinite().all()


def test_garbage_in_other_pages_does_no_harm():
    """A freed page may hold what a failed sequence left there."""
    eager, padded = make_runners("gemma2", 4)
    first = Span([3, 5], 0, [1, 2, 3, 4, 5], 1), Span([2], 0, [9], 1), Span([7], 0, [4, 4], 2)
    for runner in (eager, padded):
        runner.forward(Batch(first))
    written = [*range(4), 12, 13, 14, 15, 20, 8, 28, 29]  # and page 0, which is always finite
    stale = [slot for slot in range(len(padded.store.slots(0)[0])) if slot not in written]
    with torch.inference_mode():
        for layer in range(padded.store.num_layers):
            for memory in padded.store.slots(layer):
                memory[stale] = float("nan")
    batch = Batch((Span([3, 5], 5, [6, 7], 2), Span([2], 1, [8], 1), Span([7], 2, [1], 1)))
    assert_close(padded.forward(batch), eager.forward(batch))


def test_a_span_of_nan_leaves_the_others_alone():
    """Also those of later forwards: what pads its shape must not be kept where masked keys lie."""
    eager, padded = make_runners("llama", 4)
    batch = Batch((Span([3, 5], 0, [1, 2, 3, 4, 5], 1), Span([2], 0, [9], 1), Span([7], 0, [4], 1)))
    for runner in (eager, padded):
        runner.forward(batch)
    with torch.inference_mode():
        padded.store.slots(0)[1][3 * 4 : 4 * 4] = float("nan")
    spoilt, good = Span([3, 5], 5, [6], 1), Span([2], 1, [8, 3, 1], 3)
    logits = padded.forward(Batch((spoilt, good)))
    plain = eager.forward(Batch((spoilt, good)))
    assert logits[:1].isnan().all()
    assert_close(logits[1:], plain[1:])
    later = Batch((good, Span([7], 1, [2], 1)))
    assert_close(padded.forward(later), eager.forward(later))


def test_buffers_hold_the_batch_and_padding():
    buffers = StaticBuffers(Shape(4, 3), 16, 4, torch.device("cpu"))
    buffers.fill(Batch((Span([9, 8, 7, 6], 11, [1, 2, 3], 3),) * 4))
    keep = buffers.fill(Batch((Span([2, 5], 4, [7], 1), Span([3], 0, [4, 6], 1))))
    plan = buffers.plan()
    paging = plan.groups[0].paging()
    assert keep.tolist() == [0, 4]
    assert plan.token_ids.tolist() == [[7, 7, 7, 4, 6, 6, 0, 0, 0, 0, 0, 0]]
    assert plan.position_ids.tolist() == [[4, 4, 4, 0, 1, 1, 0, 0, 0, 0, 0, 0]]
    assert plan.slots.tolist() == [20, 20, 20, 12, 13, 13, 0, 0, 0, 0, 0, 0]
    assert paging.starts.tolist() == [4, 0, 0, 0]
    assert paging.lengths.tolist() == [5, 2, 1, 1]
    assert paging.table[:, 0].tolist() == [2, 3, 0, 0]
    assert paging.table[0, 1] == 5


def test_plan_sees_later_batches():
    """What a captured graph relies on: the tensors of a plan stay where they are."""
    buffers = StaticBuffers(Shape(1, 2), 8, 4, torch.device("cpu"))
    plan = buffers.plan()
    buffers.fill(Batch((Span([3], 1, [5, 6], 2),)))
    assert plan.token_ids.tolist() == [[5, 6]]
    assert plan.slots.tolist() == [13, 14]
    assert plan.groups[0].paging().lengths.tolist() == [3]


def spans_of(*lengths):
    return Batch(tuple(Span([1], 0, [0] * length, 1) for length in lengths))


def test_the_host_waits_before_it_writes_over_what_is_still_to_be_read(monkeypatch):
    waited: list[object] = []

    class Event:
        def query(self):
            return False

        def synchronize(self):
            waited.append(self)

        def record(self, stream):
            """The device is never done."""

    make_host = StaticBuffers._new_host
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)

    def make_pinned(buffers):
        host = make_host(buffers)
        event: Any = Event()
        host.copied = event
        return host

    monkeypatch.setattr(StaticBuffers, "_new_host", make_pinned)
    buffers = StaticBuffers(Shape(1, 1), 16, 4, torch.device("cpu"))
    for _ in range(20):
        buffers.fill(spans_of(1))
    # The first of them was filled with padding alone.
    assert len(buffers._hosts) == 16
    assert waited == [host.copied for host in buffers._hosts][-5:]


def test_shapes_are_the_smallest_that_fit():
    shapes = Shapes.of(64, 10, 512, 7)
    assert shapes.batches == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert shapes.lengths[0] == (1, 2, 3, 5, 7, 9, 10)
    assert shapes.longest == 10
    assert shapes.find(spans_of(1)) == Shape(1, 1)
    assert shapes.find(spans_of(4, 1, 6)) == Shape(4, 7)
    assert shapes.find(spans_of(*[5] * 33)) == Shape(48, 5)
    assert shapes.find(spans_of(11)) is None
    assert shapes.find(spans_of(*[1] * 65)) is None
    # Sixty-four rows of ten for 73 tokens would cost more than they spare.
    assert shapes.find(spans_of(10, *[1] * 63)) is None
    assert shapes.find(spans_of(3, *[1] * 15)) == Shape(16, 3)


@pytest.mark.parametrize(
    ("batch", "finer"), [(8, set()), (16, {6, 7}), (24, {6, 7}), (32, {4, 6, 7}), (64, {4, 6, 7})]
)
def test_lengths_are_finer_where_padding_costs(batch, finer):
    """A forward of up to 128 rows takes as long as reading the weights."""
    shapes = Shapes.of(64, 10, 2048, 5)
    assert set(shapes.lengths[shapes.batches.index(batch)]) == {1, 2, 3, 5, 9, 10} | finer
    for length in range(1, 11):
        found = shapes.find(spans_of(*[length] * batch))
        assert found in shapes.all()
        assert found.num_rows <= max(128, batch * length * 4 // 3)


def test_shapes_cover_every_step_that_fits_them():
    shapes = Shapes.of(20, 6, 40, 5)
    assert shapes.batches[-1] == 20
    every = shapes.all()
    assert every[0].num_rows == max(shape.num_rows for shape in every)
    rng = np.random.default_rng(0)
    for _ in range(300):
        count = int(rng.integers(1, 21))
        lengths = rng.integers(1, 8, size=count)
        if lengths.sum() <= 40 and (shape := shapes.find(spans_of(*map(int, lengths)))):
            assert shape in every


def test_shapes_are_those_that_the_token_budget_has_steps_of():
    shapes = Shapes.of(64, 10, 12, 5)
    steps = [
        (length, *[1] * (count - 1))
        for count in range(1, 13)
        for length in range(1, min(11, 14 - count))
    ]
    assert {shapes.find(spans_of(*lengths)) for lengths in steps} == set(shapes.all())


def test_without_cuda_nothing_is_captured():
    eager, padded = make_runners("llama", 4)
    lines: list[str] = []
    padded.warm_up(lines.append)
    assert padded.num_graphs == 0
    assert not lines
    assert (padded.name, padded.vocab_size, padded.num_pages) == ("tiny", VOCAB_SIZE, 257)


def test_where_capturing_fails_forwards_run_unpadded():
    """As on a machine without CUDA."""
    eager, padded = make_runners("llama", 4)
    graphs = GraphRunner(padded._runner, SHAPES, capture=True)
    lines: list[str] = []
    graphs.warm_up(lines.append)
    assert "tiny: running without CUDA graphs: " in lines[-1]
    assert graphs.num_graphs == 0
    batch = Batch((Span([2], 0, [1, 2, 3], 2),))
    assert_close(graphs.forward(batch), eager.forward(batch))

"""Incremental, packed, paged forwards give what one plain forward of the whole text gives."""

import random

import pytest
import torch

from server.cache.kv_store import KVStore
from server.runner.base import Batch, Span
from server.runner.torch_runner import TorchRunner
from tests.support.tiny_models import VOCAB_SIZE, make_model

SUPPORTED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "gpt2",
    "opt",
)
MAX_LENGTH = 64
NUM_SEQUENCES = 4


def make_runner(model, page_size=4, num_pages=200):
    store = KVStore(num_pages, page_size)
    return TorchRunner("tiny", model, VOCAB_SIZE, MAX_LENGTH, store)


def make_tables(rng, page_size, in_order):
    count = -(-MAX_LENGTH // page_size)
    pages = list(range(1, NUM_SEQUENCES * count + 1))
    if not in_order:
        rng.shuffle(pages)
    return [pages[i * count : (i + 1) * count] for i in range(NUM_SEQUENCES)]


class Reference:
    """Plain eager transformers over whole sequences."""

    def __init__(self, family, seed=0):
        self.model = make_model(family, seed)
        self.model.set_attn_implementation("eager")

    @torch.inference_mode()
    def __call__(self, token_ids):
        """[len(token_ids), vocab] logits."""
        ids = torch.tensor([token_ids])
        positions = torch.arange(len(token_ids))[None]
        return self.model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]


def assert_close(ours, plain):
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-5 * float(plain.abs().max()))


class Schedule:
    """Random spans of several sequences: growth, rollback to anywhere, prefill from nothing."""

    def __init__(self, rng, tables):
        self.rng = rng
        self.tables = tables
        self.sequences: list[list[int]] = [[] for _ in tables]

    def next_batch(self):
        """A batch and, in its order, (sequence, rows kept)."""
        chosen = [i for i in range(len(self.tables)) if self.rng.random() < 0.7] or [0]
        self.rng.shuffle(chosen)
        spans, kept = [], []
        for index in chosen:
            tokens = self.sequences[index]
            past = self.rng.choice([len(tokens), self.rng.randint(0, len(tokens))])
            count = min(self.rng.choice([1, 1, 1, 2, 5, 17, 24]), MAX_LENGTH - past)
            if count < 1:
                past, count = 0, 5
            new = [self.rng.randrange(VOCAB_SIZE) for _ in range(count)]
            self.sequences[index] = tokens[:past] + new
            num_kept = self.rng.choice([0, 1, count])
            spans.append(Span(self.tables[index], past, new, num_kept))
            kept.append((index, num_kept))
        return Batch(tuple(spans)), kept


@pytest.mark.parametrize(("page_size", "in_order"), [(1, False), (4, False), (16, True)])
@pytest.mark.parametrize("family", SUPPORTED)
def test_incremental_equals_full_recompute(family, page_size, in_order):
    rng = random.Random(page_size)
    schedule = Schedule(rng, make_tables(rng, page_size, in_order))
    runner = make_runner(make_model(family), page_size, 1 + NUM_SEQUENCES * MAX_LENGTH)
    reference = Reference(family)
    for _ in range(12):
        batch, kept = schedule.next_batch()
        logits = runner.forward(batch)
        assert logits.shape == (batch.num_kept, VOCAB_SIZE)
        parts = logits.split([count for _, count in kept])
        for (index, count), ours in zip(kept, parts, strict=True):
            if count:
                assert_close(ours, reference(schedule.sequences[index])[-count:])


def test_many_sequences_of_long_text():
    """Beyond the length up to which a batch is gathered, ragged, one token and several."""
    rng = random.Random(0)
    model = make_model("llama")
    runner = TorchRunner("tiny", model, VOCAB_SIZE, 512, KVStore(200, 16))
    reference = Reference("llama")
    texts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (300, 310, 30, 41)]
    tables = [list(range(1 + 30 * i, 31 + 30 * i)) for i in range(len(texts))]
    spans = [Span(t, 0, text[:-4], 1) for t, text in zip(tables, texts, strict=True)]
    runner.forward(Batch(tuple(spans)))
    for tail in (3, 1):
        spans = [
            Span(table, len(text) - 4 if tail == 3 else len(text) - 1, text[-4:-1], 3)
            if tail == 3
            else Span(table, len(text) - 1, text[-1:], 1)
            for table, text in zip(tables, texts, strict=True)
        ]
        logits = runner.forward(Batch(tuple(spans)))
        wanted = slice(-4, -1) if tail == 3 else slice(-1, None)
        assert_close(logits, torch.cat([reference(text)[wanted] for text in texts]))


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_packed_batch_equals_single(family):
    rng = random.Random(1)
    texts = [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (5, 1, 9, 5, 20)]
    tables = [[5 * i + j + 1 for j in range(5)] for i in range(len(texts))]
    spans = [Span(t, 0, text, len(text)) for t, text in zip(tables, texts, strict=True)]
    together = make_runner(make_model(family)).forward(Batch(tuple(spans)))
    alone = make_runner(make_model(family))
    assert_close(together, torch.cat([alone.forward(Batch((span,))) for span in spans]))


def test_two_runners_interleaved():
    texts = [list(range(10, 22)), list(range(100, 112))]
    runners = [make_runner(make_model("llama", seed)) for seed in (0, 1)]
    references = [Reference("llama", seed) for seed in (0, 1)]
    for start in range(0, 12, 3):
        for runner, reference, text in zip(runners, references, texts, strict=True):
            span = Span([3, 1, 2], start, text[start : start + 3], 3)
            ours = runner.forward(Batch((span,)))
            assert_close(ours, reference(text[: start + 3])[start:])


def test_padded_vocabulary_is_cut():
    model = make_model("qwen2", vocab_size=VOCAB_SIZE + 56)
    logits = make_runner(model).forward(Batch((Span([1, 2], 0, [1, 2, 3], 3),)))
    assert logits.shape == (3, VOCAB_SIZE)


def test_nothing_kept():
    logits = make_runner(make_model()).forward(Batch((Span([1, 2], 0, [1, 2, 3], 0),)))
    assert logits.shape == (0, VOCAB_SIZE)


@torch.inference_mode()
def test_broken_values_of_one_sequence_stay_its_own():
    """NaN in the pages of one sequence must not reach its neighbours, nor later owners."""
    runner = make_runner(make_model())
    texts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    spans = [Span([1, 2], 0, texts[0], 1), Span([3, 4], 0, texts[1], 1)]
    clean = runner.forward(Batch(tuple(spans)))
    for keys in runner.store._keys.values():
        keys[3:5] = float("nan")
    singles = [Span([1, 2], 5, [9], 1), Span([3, 4], 3, [9], 1)]
    logits = runner.forward(Batch(tuple(singles)))
    assert logits[0].isfinite().all()
    assert logits[1].isnan().any()
    assert_close(runner.forward(Batch(tuple(spans[::-1])))[1], clean[0])
    # The next owner of the page writes over what it reads.
    assert_close(runner.forward(Batch((Span([3, 4], 0, texts[0], 1),)))[0], clean[0])


def test_logits_come_in_the_order_of_the_batch():
    texts = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10]]
    spans = [Span([2 * i + 1, 2 * i + 2], 0, text, 1) for i, text in enumerate(texts)]
    logits = make_runner(make_model()).forward(Batch(tuple(spans)))
    reference = Reference("llama")
    assert_close(logits, torch.stack([reference(text)[-1] for text in texts]))

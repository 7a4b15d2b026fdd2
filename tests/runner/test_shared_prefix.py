"""Sequences that begin with the same pages attend to them together, and nothing else changes."""

import random

import pytest
import torch

from server.cache.kv_store import KVStore
from server.config_file import parse_config
from server.core.combination import Combination
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.runner import attention, grouping, plan
from server.runner.base import Batch, Span
from server.runner.loader import load_models
from server.runner.style import Style
from tests.runner.test_torch_runner import SUPPORTED, Reference, assert_close, make_runner
from tests.support.engines import generated, make_decoding, run
from tests.support.tiny_models import VOCAB_SIZE, make_model, make_pair

PAGE = 4
SHARED = 20  # tokens
PLAIN = {"llama", "qwen2", "qwen3", "phi3", "gpt2", "opt"}  # full attention, no softcap, no sinks


@pytest.fixture
def calls(monkeypatch):
    """Short texts count as long; sizes of the groups that were attended in two parts."""
    monkeypatch.setattr(grouping, "MAX_GATHERED_LENGTH", 16)
    monkeypatch.setattr(grouping, "MIN_SHARED_LENGTH", 8)
    seen = []
    original = attention._attend_shared

    def counted(group, *others):
        seen.append(group.num_spans)
        return original(group, *others)

    monkeypatch.setattr(attention, "_attend_shared", counted)
    return seen


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("family", SUPPORTED)
def test_logits_are_those_of_each_sequence_alone(family, in_order, calls):
    rng = random.Random(3)
    reference = Reference(family)
    runner = make_runner(make_model(family, 0), page_size=PAGE)
    free = list(range(1, 150))
    if not in_order:
        rng.shuffle(free)
    # Two beginnings, of which one is nobody else's, and texts of unequal lengths after them.
    beginnings = [[rng.randrange(VOCAB_SIZE) for _ in range(SHARED)] for _ in range(3)]
    pages = [[free.pop(0) for _ in range(SHARED // PAGE)] for _ in beginnings]
    for tokens, table in zip(beginnings, pages, strict=True):
        runner.forward(Batch((Span(table, 0, tokens, 0),)))
    texts, spans = [], []
    for number, which in enumerate([0, 0, 1, 0, 2, 1, 0, 0]):
        # The first is too long to be together with those that begin like it.
        own = [rng.randrange(VOCAB_SIZE) for _ in range(number % 4 + 3 if number else 22)]
        table = [*pages[which], *(free.pop(0) for _ in range(6))]
        count = 3 if number in (3, 6) else 1
        if len(own) > count:
            runner.forward(Batch((Span(table, SHARED, own[:-count], 0),)))
        texts.append(beginnings[which] + own)
        spans.append(Span(table, SHARED + len(own) - count, own[-count:], count))
    calls.clear()
    logits = runner.forward(Batch(tuple(spans))).split([span.num_kept for span in spans])
    for text, ours in zip(texts, logits, strict=True):
        assert_close(ours, reference(text)[-len(ours) :])
    if family in PLAIN:
        assert sorted(set(calls)) == [2], "0 and 0 alone, 0 and 0 with 3 tokens, 1 and 1"


def attend(spans, style, value_dim):
    """[T, heads, value dim] over a store full of noise, two query heads for a KV head."""
    generator = torch.Generator().manual_seed(1)
    store = KVStore(60, PAGE)
    slots = torch.arange(60 * PAGE)
    keys = torch.randn(len(slots), 2, 8, generator=generator)
    store.write(0, slots, keys, torch.randn(len(slots), 2, value_dim, generator=generator))
    queries = torch.randn(sum(len(s.token_ids) for s in spans), 4, 8, generator=generator)
    groups = plan.make_plan(Batch(tuple(spans)), PAGE, torch.device("cpu"), gathers=True).groups
    parts = [attention.attend_group(g, queries[g.rows], store, 0, style) for g in groups]
    return torch.cat(parts), [group.num_spans for group in groups]


@pytest.mark.parametrize(
    ("style", "value_dim"),
    [
        (Style(None, 0, None, None), 8),
        (Style(None, 0, None, None), 6),
        (Style(0.3, 9, None, None), 8),
        (Style(0.3, 0, 20.0, None), 8),
    ],
)
def test_layers_of_other_kinds_attend_each_text_alone(style, value_dim, calls, monkeypatch):
    spans = [Span([1, 2, 3, 4, 5, 10 + i, 20 + i], 22 + i, [0], 1) for i in range(3)]
    together, sizes = attend(spans, style, value_dim)
    assert sizes == [3]
    assert bool(calls) == (style == Style(None, 0, None, None) and value_dim == 8)
    monkeypatch.setattr(grouping, "MIN_SHARED_LENGTH", 1000)
    alone, sizes = attend(spans, style, value_dim)
    assert sizes == [1, 1, 1]
    torch.testing.assert_close(together, alone)


def test_who_is_together(calls):
    first = [1, 2, 3, 4, 5]
    alike = [Span([*first, 10 + i, 20 + i], 22 + i, [0], 1) for i in range(3)]
    longer = Span([*first, *range(30, 40)], 50, [0], 1)
    other = Span([1, *range(50, 57)], 25, [0], 1)
    _, sizes = attend([longer, other, *alike], Style(None, 0, None, None), 8)
    assert sorted(sizes) == [1, 1, 3], "one long text, or one that only begins alike, ends nothing"
    for gathers, num_saved in ((True, 2 * 5 * PAGE), (False, 0)):
        spans = [longer, other, *alike]
        count = plan.num_attended(spans, PAGE, gathers)
        assert count == sum(span.num_past for span in spans) - num_saved
    short = [Span([1, 2, 10 + i, 20 + i, 40 + i], 18, [0], 1) for i in range(2)]
    _, sizes = attend(short, Style(None, 0, None, None), 8)
    assert sizes == [1, 1], "8 tokens in common and 11 of each one's own do not pay"


def test_texts_stay_the_same(tmp_path, calls):
    models = load_models(
        parse_config(
            {
                "served_model_name": "tiny",
                "models": [{"name": path.name, "path": str(path)} for path in make_pair(tmp_path)],
                "combination": {"method": "weighted", "weights": [0.5, 0.5]},
                "engine": {
                    "kv_memory": "16MiB",
                    "max_length": 96,
                    "page_size": PAGE,
                    "cpu_kernels": "off",
                },
            }
        )
    )
    decoding = make_decoding("cos", Combination.weighted([0.5, 0.5]), gamma=2)
    rng = random.Random(5)
    prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(SHARED)]

    def write(together):
        engine = Engine(
            models.runners, models.tokenizer.backend_tokenizer, frozenset(), EngineLimits()
        )
        sequences = [
            Sequence.start(
                f"s{i}",
                [*prompt, 5 + i],
                SamplingParams(max_tokens=10, temperature=heat, seed=i, is_seeded=True),
                decoding,
            )
            for i, heat in enumerate((0.0, 0.0, 1.0, 1.0))
        ]
        parts = [sequences] if together else [[sequence] for sequence in sequences]
        return {
            name: generated(deltas) for part in parts for name, deltas in run(engine, part).items()
        }

    alone = write(together=False)
    assert not calls
    assert write(together=True) == alone
    assert max(calls) > 1

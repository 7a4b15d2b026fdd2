"""Groups of short queries over noise in paged KV memory, attended in two ways."""

import random

import torch

from server.cache.kv_store import KVStore
from server.runner.attention import attend_group
from server.runner.base import Batch, Span
from server.runner.plan import make_plan
from server.runner.style import Style

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN = Style(None, 0, None, None)
MAX_LENGTH = 150
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make_case(
    num_tokens, lengths, page_size, heads, kv_heads, dim, dtype, value_dim=None, *, device=DEVICE
):
    """Queries of one group over a store full of noise, pages in random order."""
    generator = torch.Generator().manual_seed(num_tokens)
    width = -(-max(MAX_LENGTH, *lengths) // page_size)
    pages = list(range(1, 1 + len(lengths) * width))
    random.Random(0).shuffle(pages)
    spans = tuple(
        Span(pages[i * width : i * width + width], length - num_tokens, [0] * num_tokens, 1)
        for i, length in enumerate(lengths)
    )
    store = KVStore(1 + len(pages), page_size)
    slots = torch.arange(store.num_pages * page_size, device=device)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    keys = noise(len(slots), kv_heads, dim)
    store.write(0, slots, keys, noise(len(slots), kv_heads, value_dim or dim))
    queries = noise(len(lengths) * num_tokens, heads, 2 * dim)[..., :dim]
    groups = make_plan(Batch(spans), page_size, device).groups
    return groups, queries, store


def assert_same(kernels, case, style=PLAIN):
    """`kernels`, a ShortAttention, attend as torch does."""
    groups, queries, store = case
    tolerance = TOLERANCE[queries.dtype]
    for group in groups:
        assert kernels.supports(group, queries, store, 0, style)
        ours = kernels.attend_group(group, queries[group.rows], store, 0, style)
        plain = attend_group(group, queries[group.rows], store, 0, style)
        assert ours.shape == plain.shape
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours.float(), plain.float(), rtol=tolerance, atol=tolerance)


def spoil_others(case):
    """NaN wherever no sequence of the case has a token: a freed page may hold it."""
    groups, _, store = case
    stale = torch.ones(len(store.slots(0)[0]), dtype=torch.bool)
    for group in groups:
        for length, pages in zip(group.lengths, group.pages, strict=True):
            for position in range(length):
                page = pages[position // store.page_size]
                stale[page * store.page_size + position % store.page_size] = False
    for memory in store.slots(0):
        memory[stale.to(memory.device)] = torch.nan

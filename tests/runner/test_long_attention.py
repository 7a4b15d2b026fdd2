"""Torch's attention of long pieces of prompts, on a GPU where there is one."""

from dataclasses import replace

import pytest
import torch

from server.cache.kv_store import KVStore
from server.runner import attention
from server.runner.attention import attend_group
from server.runner.base import Batch, Span
from server.runner.plan import make_plan
from tests.support.attention_cases import DEVICE, PLAIN

PAGE_SIZE = 16


def expected(parts, window):
    """Written out in float64; queries are of the last tokens, a window of 0 is none."""
    queries, keys, values = parts
    heads, count = queries.shape[1] // keys.shape[1], len(queries)
    keys, values = (part.double().repeat_interleave(heads, 1) for part in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", queries.double(), keys) * queries.shape[-1] ** -0.5
    seen = torch.ones(count, len(keys)).tril(len(keys) - count)
    if window:
        seen = seen.triu(len(keys) - count - window + 1)
    return torch.einsum(
        "hqk,khd->qhd", scores.masked_fill(seen == 0, -torch.inf).softmax(-1), values
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_past", [0, 40])
@pytest.mark.parametrize("num_tokens", [32, 33, 65, 97, 129])
@pytest.mark.parametrize("how", ["as it is", "as on GPUs", "window"])
def test_a_piece_of_a_prompt(how, num_tokens, num_past, dtype, monkeypatch):
    """Of whole blocks of queries, and of one more."""
    if how == "as on GPUs":
        monkeypatch.setattr(attention, "_CAUSAL_DEVICES", {"cuda", "cpu"})
    window = 20 if how == "window" else 0
    length = num_past + num_tokens
    pages = range(1, 2 + (length - 1) // PAGE_SIZE)
    random = torch.Generator().manual_seed(num_tokens)
    shapes = (num_tokens, 8), (length, 2), (length, 2)
    parts = [torch.randn(*shape, 64, generator=random).to(dtype) for shape in shapes]
    queries, keys, values = (part.to(DEVICE) for part in parts)
    store = KVStore(1 + len(pages), PAGE_SIZE)
    store.write(0, torch.arange(PAGE_SIZE, PAGE_SIZE + length, device=DEVICE), keys, values)
    batch = Batch((Span(pages, num_past, [0] * num_tokens, 1),))
    (group,) = make_plan(batch, PAGE_SIZE, DEVICE).groups
    style = replace(PLAIN, window=window)
    found = attend_group(group, queries, store, 0, style).cpu().double()
    limit = 5e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected(parts, window), rtol=0, atol=limit)

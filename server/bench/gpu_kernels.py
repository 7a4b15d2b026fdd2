"""The Triton kernels against the portable path: right first, then how fast."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch

from server.bench.gpu_timing import median_launch_seconds
from server.cache.kv_store import KVStore
from server.runner.attention import ShortAttention, attend_group
from server.runner.base import Batch, Span
from server.runner.plan import Group, make_plan
from server.runner.style import Style

_PAGE_SIZE = 16
# Largest difference allowed, as a share of the value where that is above 1.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_PLAIN = Style(None, 0, None, None)
_Case = tuple[Group, torch.Tensor, KVStore]
# (tokens each, lengths, (heads, kv heads), head dimension)
_CASES = [
    *((n, [n, 17 + n, 300], (32, 8), dim) for n in range(1, 10) for dim in (64, 128)),
    *((n, [1000, 33], heads, 64) for n in (1, 5) for heads in ((9, 3), (8, 1), (4, 4))),
    *((n, [4097], (32, 8), 128) for n in (1, 2, 5)),
    *((n, [300] * 40, (32, 8), 128) for n in (1, 5)),  # so many that nothing is split
]
_STYLES = {
    "window": Style(None, 100, None, None),
    "softcap": Style(0.1, 0, 20.0, None),
    "sinks": Style(None, 64, None, torch.linspace(-2, 2, 32)),
}


def check_kernels(
    kernels: ShortAttention, device: torch.device, dtypes: list[torch.dtype], limit: int | None
) -> list[dict[str, Any]]:
    """One row a case: its largest difference to the portable path, and whether that is allowed.

    Of a case that raises an error, that takes the place of the difference.

    Args:
        kernels: to be checked.
        device: of the tensors.
        dtypes: to go through.
        limit: check so many cases of each type only; None: all.
    """
    rows = []
    for dtype in dtypes:
        cases = [(*case, "plain", _PLAIN) for case in _CASES]
        cases += [(5, [700, 9], (32, 8), 64, name, style) for name, style in _STYLES.items()]
        for num_tokens, lengths, heads, dim, name, style in cases[:limit]:
            row: dict[str, Any] = {
                "dtype": str(dtype).removeprefix("torch."),
                "num_tokens": num_tokens,
                "lengths": lengths,
                "heads": list(heads),
                "dim": dim,
                "style": name,
                "passed": False,
            }
            rows.append(row)
            try:
                case = _case(num_tokens, lengths, heads, dim, dtype, device)
                row["difference"] = _difference(kernels, case, style)
            except Exception as error:  # one that does not compile must not cost the others
                row["error"] = f"{type(error).__name__}: {error}"[:500]
            else:
                row["passed"] = row["difference"] <= TOLERANCE[dtype]  # False for NaN
    return rows


def _difference(kernels: ShortAttention, case: _Case, style: Style) -> float:
    """The largest, as a share of the value where that is above 1."""
    group, queries, store = case
    if style.sinks is not None:
        sinks = style.sinks.to(queries.device, queries.dtype)
        style = Style(style.scale, style.window, None, sinks)
    ours = kernels.attend_group(group, queries, store, 0, style).float()
    plain = attend_group(group, queries, store, 0, style).float()
    return float(((ours - plain).abs() / plain.abs().clamp_min(1)).max())


def time_kernels(
    kernels: ShortAttention,
    device: torch.device,
    dtype: torch.dtype,
    shapes: list[tuple[int, int, int]],
    bandwidth: float,
) -> list[dict[str, Any]]:
    """Seconds of one layer's attention, Llama-3.1-8B's heads, by both paths.

    Args:
        kernels: to be timed.
        device: of the tensors.
        dtype: of the tensors.
        shapes: (sequences, length, tokens each).
        bandwidth: bytes a second, for the share of it that reading the keys and values takes.
    """
    rows = []
    for batch, length, num_tokens in shapes:
        group, queries, store = _case(num_tokens, [length] * batch, (32, 8), 128, dtype, device)
        ours, plain = (
            median_launch_seconds(partial(attend, group, queries, store, 0, _PLAIN), device)
            for attend in (kernels.attend_group, attend_group)
        )
        size = 2 * batch * length * 8 * 128 * queries.element_size()
        rows.append(
            {
                "batch": batch,
                "length": length,
                "num_tokens": num_tokens,
                "kernel_seconds": ours,
                "portable_seconds": plain,
                "bandwidth_share": size / bandwidth / ours,
            }
        )
    return rows


def _case(
    num_tokens: int,
    lengths: list[int],
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _Case:
    """A group over a store full of noise, its pages in random order."""
    generator = torch.Generator(device).manual_seed(num_tokens)
    widths = [-(-length // _PAGE_SIZE) for length in lengths]
    pages = list(range(1, 1 + sum(widths)))
    random.Random(0).shuffle(pages)
    spans = []
    for length, width in zip(lengths, widths, strict=True):
        table, pages = pages[:width], pages[width:]
        spans.append(Span(table, length - num_tokens, [0] * num_tokens, 1))
    store = KVStore(1 + sum(widths), _PAGE_SIZE)
    slots = torch.arange(store.num_pages * _PAGE_SIZE, device=device)

    def noise(rows: int, num_heads: int) -> torch.Tensor:
        shape = rows, num_heads, dim
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    store.write(0, slots, noise(len(slots), heads[1]), noise(len(slots), heads[1]))
    plan = make_plan(Batch(tuple(spans)), _PAGE_SIZE, device)
    # On the CPU long spans are attended one by one; the first is enough there.
    group = plan.groups[0]
    return group, noise(group.num_spans * num_tokens, heads[0]), store

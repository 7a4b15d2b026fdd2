"""Compiles the attention kernels for GPUs that need not be there, as `attend_group` launches them.

    python -m tests.support.compile_kernels

Prints a line for each binary: kernel, architecture, bytes of shared memory, bytes of code.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.cache.kv_store import KVStore
from server.runner import triton_attention
from server.runner.base import Batch, Span
from server.runner.plan import make_plan
from server.runner.style import Style

CPU = torch.device("cpu")
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
OPTIONS = {"num_warps", "num_stages"}


class Recorder:
    """Stands where a kernel stands; a launch compiles it instead of running it."""

    def __init__(self, kernel: Callable[..., object], architecture: int) -> None:
        self._kernel = kernel
        self._architecture = architecture

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Tensor | float, **named: int) -> None:
        names = self._kernel.arg_names  # type: ignore[attr-defined]
        constants = {name: value for name, value in named.items() if name not in OPTIONS}
        values = dict(zip(names, args, strict=False))
        signature = {
            name: "constexpr" if name in constants else _type(values[name]) for name in names
        }
        # What a launch finds out about its arguments: addresses and strides of whole vectors.
        unknown = self._kernel.do_not_specialize  # type: ignore[attr-defined]
        whole = [
            (index,)
            for index, name in enumerate(names)
            if name not in unknown and (signature[name].startswith("*") or name.endswith("stride"))
        ]
        source = ASTSource(
            self._kernel,
            signature,
            constexprs=constants,
            attrs={index: [["tt.divisibility", 16]] for index in whole},
        )
        options = {name: value for name, value in named.items() if name in OPTIONS}
        target = GPUTarget("cuda", self._architecture, 32)
        binary = triton.compile(source, target=target, options=options)
        name = self._kernel.__name__
        size = len(binary.asm["cubin"])
        print(name, self._architecture, binary.metadata.shared, size, flush=True)


def _type(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def launch(
    num_tokens: int,
    num_spans: int,
    length: int,
    style: Style,
    dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """One launch, of 8 query heads over 2 KV heads of `dim`."""
    page_size = 16
    width = length // page_size
    store = KVStore(1 + num_spans * width, page_size)
    some = torch.zeros(1, 2, dim, dtype=dtype)
    store.write(0, torch.tensor([0]), some, some)
    pages = random.Random(0).sample(range(1, store.num_pages), num_spans * width)
    spans = tuple(
        Span(pages[i * width : (i + 1) * width], length - num_tokens, [0] * num_tokens, 1)
        for i in range(num_spans)
    )
    (group,) = make_plan(Batch(spans), page_size, CPU).groups
    queries = torch.zeros(num_spans * num_tokens, 8, dim, dtype=dtype)
    assert triton_attention.supports(group, queries, store, 0, style)
    triton_attention.attend_group(group, queries, store, 0, style)


def main() -> None:
    """Few and many sequences, with all that a style may have and without."""
    triton_attention._attend_split = Recorder(triton_attention._attend_split, 90)
    triton_attention._combine_splits = Recorder(triton_attention._combine_splits, 90)
    launch(1, 1, 2048, Style(None, 0, None, None))
    launch(16, 140, 256, Style(0.1, 64, 5.0, torch.zeros(8, dtype=torch.bfloat16)))
    # As many bytes of queries as are supported.
    launch(16, 140, 256, Style(None, 0, None, None), 128, torch.float32)


if __name__ == "__main__":
    main()

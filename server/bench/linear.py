"""Time of one matrix product in each layout that weights may have on the CPU, by rows.

    python -m server.bench.linear --rows 1,8,16,80,512

Which layouts the server keeps for that: see docs/performance.md. CPU time of one
thread, least of several rounds; as many equal weights are used in turns as keep them out of the
caches, as in a model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from server.bench.machine import describe_machine, describe_versions
from server.bench.strategy_spec import parse_concurrency
from server.runner.packed_linear import (
    BFloat16Linear,
    Float32Linear,
    PackedLinear,
    PackingReport,
    multiplies_bfloat16,
    multiplies_in_kernels,
    pack_linear,
)
from server.simd import support

# (outputs, inputs) of SmolLM2-135M: q/k/v as one, output, gate/up as one, down, head.
SHAPES = {
    "q/k/v": (960, 576),
    "output": (576, 576),
    "gate/up": (3072, 576),
    "down": (576, 1536),
    "head": (49152, 576),
}
_BYTES = 64 << 20  # of float32 weights that take turns, twice a large cache

Product = Callable[[Tensor], Tensor]


def layouts(weight: Tensor) -> dict[str, Product]:
    """`x @ weight.T` in each layout; `weight` [out, in] float32 holds float16 numbers.

    bfloat16 only where the processor multiplies it; its weights are rounded once more.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    transposed = weight.t().contiguous()
    half = weight.half()
    products: dict[str, Product] = {
        "16 bits, packed": PackedLinear(linear),
        "float32": lambda x: F.linear(x, weight),
        "float32, packed": Float32Linear(linear),
        "float32, transposed": lambda x: x @ transposed,
        "16 bits, widened each time": lambda x: F.linear(x, half.float()),
    }
    kernels = support.missing() is None
    if kernels and multiplies_in_kernels(torch.float32):
        products["kernels, 16 bits"] = pack_linear(linear, PackingReport(), kernels=True)
    if multiplies_bfloat16():
        narrow = linear.bfloat16()
        products["bfloat16, packed"] = BFloat16Linear(narrow).multiply
        if kernels and multiplies_in_kernels(torch.bfloat16):
            products["kernels, bfloat16"] = pack_linear(narrow, PackingReport(), kernels=True)
    return products


@torch.inference_mode()
def measure(shape: tuple[int, int], num_rows: int, rounds: int) -> dict[str, float]:
    """Seconds of CPU time of one product, by layout."""
    count = max(2, _BYTES // (4 * shape[0] * shape[1]))
    weights = [layouts(torch.randn(shape).half().float()) for _ in range(count)]
    x = torch.randn(num_rows, shape[1])
    for product in weights[0].values():
        product(x)  # kernels are compiled
    return {
        name: min(_time([weight[name] for weight in weights], x) for _ in range(rounds))
        for name in weights[0]
    }


def _time(products: Sequence[Product], x: Tensor) -> float:
    started = time.thread_time()
    for product in products:
        product(x)
    return (time.thread_time() - started) / len(products)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table for each shape."""
    parser = argparse.ArgumentParser(prog="python -m server.bench.linear")
    parser.add_argument("--rows", default="1,8,16,80,512", help="of the input (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each figure (%(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console(width=160)
    machine, versions = describe_machine(), describe_versions()
    console.print(f"{machine['cpu']}, torch {versions['torch']}, 1 thread; ms and GFLOP/s")
    for name, shape in SHAPES.items():
        table = Table(title=f"{name} {shape}", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("rows", justify="right")
        for row, num_rows in enumerate(parse_concurrency(options.rows)):
            seconds = measure(shape, num_rows, options.rounds)
            if row == 0:
                for layout in seconds:
                    table.add_column(layout, justify="right")
            flops = 2 * num_rows * shape[0] * shape[1]
            cells = [f"{s * 1e3:.2f} ({flops / s / 1e9:.0f})" for s in seconds.values()]
            table.add_row(str(num_rows), *cells)
        console.print(table)


if __name__ == "__main__":
    main()

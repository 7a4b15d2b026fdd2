"""What the host does for a step of the engine, with models that take no time.

    python -m server.bench.host --batch 1 8 32 64 --gamma 4

Beside a GPU the host has to have enqueued a step before the device has done the one before; and
between what a cycle decided and the next forward the device waits for it. This is the engine as it
works there (it runs ahead, and torch's operations decide), on one thread of a CPU, over models that
give random logits of few tokens: what is left is Python and small operations. Launching kernels,
which a GPU adds, is not in it. Seconds are of the thread's processor clock.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence as Row
from dataclasses import dataclass, field

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from server.bench.gpu_engine import Numbers, add_texts, make_decoding, make_prompts
from server.bench.machine import describe_machine, describe_versions
from server.core.sampling_params import DecodingParams
from server.core.stats import StepStats
from server.engine.engine import Engine, EngineLimits
from server.runner.base import Batch

_VOCAB_SIZE = 64
_PAGE_SIZE = 16
_CONTEXT = 1024
_SPREAD = 3.0  # of logits
_LIKENESS = 0.8  # share of the proposer's logits that are the expert's


@dataclass(slots=True)
class _Weightless:
    """A ModelRunner whose logits go by a token's position alone, rows of `table`."""

    name: str
    table: Tensor
    num_pages: int
    vocab_size: int = _VOCAB_SIZE
    max_length: int = 2 * _CONTEXT
    page_size: int = _PAGE_SIZE
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    gathers: bool = False
    deferred: None = None

    def forward(self, batch: Batch) -> Tensor:
        """See ModelRunner.forward."""
        rows = [
            span.num_past + len(span.token_ids) - back
            for span in batch.spans
            for back in range(span.num_kept, 0, -1)
        ]
        return self.table[torch.tensor(rows)]


def _models(num_sequences: int) -> tuple[_Weightless, _Weightless]:
    noise = torch.Generator().manual_seed(0)
    other, expert = _SPREAD * torch.randn(2, 2 * _CONTEXT, _VOCAB_SIZE, generator=noise)
    proposer = _LIKENESS * expert + (1 - _LIKENESS) * other
    num_pages = 1 + num_sequences * 2 * _CONTEXT // _PAGE_SIZE
    return (
        _Weightless("proposer", proposer, num_pages),
        _Weightless("expert", expert, num_pages),
    )


@torch.inference_mode()
def time_steps(
    batch: int, decoding: DecodingParams, temperature: float, num_tokens: int
) -> tuple[float, float]:
    """Seconds of a step and of a cycle, means over those in which all of `batch` texts decode.

    A cycle is all that the engine does from one step of the last model to its next.
    """
    steps: list[StepStats] = []
    limits = EngineLimits(
        max_sequences=batch, max_step_tokens=2048, runs_ahead=True, cpu_kernels="off"
    )
    engine = Engine(_models(batch), Numbers(), frozenset(), limits, on_step=steps.append)
    prompts = make_prompts(batch, _CONTEXT, _VOCAB_SIZE)
    add_texts(engine, prompts, decoding, temperature, num_tokens, is_read=True)
    seconds: list[float] = []
    engine.step()
    while len(engine.scheduler.running) == batch:
        before = time.thread_time()
        engine.step()
        seconds.append(time.thread_time() - before)
    num_cycles = sum(step.model == engine.num_models - 1 for step in steps)
    return sum(seconds) / len(seconds), sum(seconds) / num_cycles


def main(argv: Row[str] | None = None) -> None:
    """Print one row for each batch."""
    options = _parse(argv)
    torch.set_num_threads(1)
    machine, versions = describe_machine(), describe_versions()
    console = Console(width=max(Console().width, 100))
    console.print(f"{machine['cpu']}, torch {versions['torch']}, 1 thread")
    table = Table(title=f"host, {options.strategy}", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("texts", "ms a step", "ms a cycle", "µs a step and text"):
        table.add_column(heading, justify="right")
    decoding = make_decoding(options.strategy, options.gamma)
    gc.collect()
    gc.freeze()  # as a server does
    for batch in options.batch:
        rounds = [
            time_steps(batch, decoding, options.temperature, options.tokens)
            for _ in range(options.rounds)
        ]
        step, cycle = (min(each) for each in zip(*rounds, strict=True))
        table.add_row(
            str(batch), f"{step * 1e3:.2f}", f"{cycle * 1e3:.2f}", f"{step / batch * 1e6:.0f}"
        )
    gc.unfreeze()
    console.print(table)


def _parse(argv: Row[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.bench.host")
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[1, 8, 32, 64], help="texts at once (%(default)s)")
    add("--strategy", choices=("standard", "speculative", "cos"), default="cos")
    add("--gamma", type=int, default=4, help="tokens proposed (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    add("--tokens", type=int, default=40, help="of each text (%(default)s)")
    add("--rounds", type=int, default=3, help="of which the least counts (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

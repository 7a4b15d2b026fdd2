"""What the host does for a step of the engine, with models that take no time.

    python -m server.bench.host --batch 1 8 32 64 --gamma 4 --observed

Beside a GPU the host has to have enqueued a step before the device has done the one before; and
between what a cycle decided and the next forward the device waits for it: the *gap*. This is the
engine as it works there (it runs ahead, and torch's operations decide), on one thread of a CPU,
over models that give random logits of few tokens: what is left is Python and small operations.
Launching kernels, which a GPU adds, is not in it. Seconds are of the thread's processor clock.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence as Row
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from server.bench.gpu_engine import Numbers, add_texts, make_decoding, make_prompts
from server.bench.machine import describe_machine, describe_versions
from server.config_file import parse_config
from server.core.sampling_params import DecodingParams
from server.core.stats import StepStats
from server.engine.calibration import calibrate
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.metrics import Metrics
from server.runner.base import Batch

_VOCAB_SIZE = 64
_PAGE_SIZE = 16
_CONTEXT = 1024
_SPREAD = 3.0  # of logits
_LIKENESS = 0.8  # share of the proposer's logits that are the expert's
_NAMES = "proposer", "expert"


class HostSeconds(NamedTuple):
    """Of one step, of one cycle, and of the gap in it."""

    step: float
    cycle: float
    gap: float


class _Gaps:
    """From where the host has read what a step decided to the next forward."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since: float | None = None

    def watch(self, reading: Callable[..., Any]) -> Callable[..., Any]:
        """`reading`, with a gap that begins where it has returned."""

        def watched(*args: Any) -> Any:
            read = reading(*args)
            self._since = time.thread_time()
            return read

        return watched

    def end(self) -> None:
        """A forward begins."""
        if self._since is not None:
            self.seconds.append(time.thread_time() - self._since)
        self._since = None


@dataclass(slots=True)
class _Weightless:
    """A ModelRunner whose logits go by a token's position alone, rows of `table`."""

    name: str
    table: Tensor
    num_pages: int
    gaps: _Gaps
    vocab_size: int = _VOCAB_SIZE
    max_length: int = 2 * _CONTEXT
    page_size: int = _PAGE_SIZE
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    gathers: bool = False
    deferred: None = None

    def forward(self, batch: Batch) -> Tensor:
        """See ModelRunner.forward."""
        self.gaps.end()
        rows = [
            span.num_past + len(span.token_ids) - back
            for span in batch.spans
            for back in range(span.num_kept, 0, -1)
        ]
        return self.table[torch.tensor(rows)]


def _models(num_sequences: int, gaps: _Gaps) -> tuple[_Weightless, _Weightless]:
    noise = torch.Generator().manual_seed(0)
    other, expert = _SPREAD * torch.randn(2, 2 * _CONTEXT, _VOCAB_SIZE, generator=noise)
    proposer = _LIKENESS * expert + (1 - _LIKENESS) * other
    num_pages = 1 + num_sequences * 2 * _CONTEXT // _PAGE_SIZE
    return (
        _Weightless(_NAMES[0], proposer, num_pages, gaps),
        _Weightless(_NAMES[1], expert, num_pages, gaps),
    )


@torch.inference_mode()
def time_steps(
    batch: int,
    decoding: DecodingParams,
    temperature: float,
    num_tokens: int,
    is_observed: bool = False,
) -> HostSeconds:
    """Means over the steps in which all of `batch` texts decode.

    A cycle is all that the engine does from one step of the last model to its next. With
    `is_observed` it learns of its steps and counts them, as in a server.
    """
    steps: list[StepStats] = []
    limits = EngineLimits(
        max_sequences=batch, max_step_tokens=2048, runs_ahead=True, cpu_kernels="off"
    )
    gaps = _Gaps()
    engine = Engine(_models(batch, gaps), Numbers(), frozenset(), limits)
    drafted = engine._advancer.drafted
    drafted.read_with = gaps.watch(drafted.read_with)  # type: ignore[method-assign]
    observe = _observe(engine, decoding) if is_observed else None

    def on_step(step: StepStats) -> None:
        steps.append(step)
        if observe is not None:
            observe(step)

    engine.observer.on_step = on_step
    prompts = make_prompts(batch, _CONTEXT, _VOCAB_SIZE)
    add_texts(engine, prompts, decoding, temperature, num_tokens, is_read=True)
    seconds: list[float] = []
    engine.step()
    gaps.seconds.clear()
    while len(engine.scheduler.running) == batch:
        before = time.thread_time()
        engine.step()
        seconds.append(time.thread_time() - before)
    num_cycles = sum(step.model == engine.num_models - 1 for step in steps)
    return HostSeconds(
        sum(seconds) / len(seconds), sum(seconds) / num_cycles, sum(gaps.seconds) / num_cycles
    )


def _observe(engine: Engine, decoding: DecodingParams) -> Callable[[StepStats], None]:
    """Give `engine` costs and a controller; returns what counts its steps for metrics."""
    costs = calibrate(engine, decoding.combination)
    assert costs is not None
    engine.control(costs)
    models = [{"name": name, "path": name} for name in _NAMES]
    combination = {"method": decoding.combination.method}
    config = {"served_model_name": "host", "models": models, "combination": combination}
    return Metrics(parse_config(config)).observe_step


def main(argv: Row[str] | None = None) -> None:
    """Print one row for each batch."""
    options = _parse(argv)
    torch.set_num_threads(1)
    machine, versions = describe_machine(), describe_versions()
    console = Console(width=max(Console().width, 100))
    console.print(f"{machine['cpu']}, torch {versions['torch']}, 1 thread")
    table = Table(title=f"host, {options.strategy}", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("texts", "ms a step", "ms a cycle", "µs a step and text", "ms of gaps a cycle"):
        table.add_column(heading, justify="right")
    decoding = make_decoding(options.strategy, options.gamma)
    gc.collect()
    gc.freeze()  # as a server does
    for batch in options.batch:
        rounds = [
            time_steps(batch, decoding, options.temperature, options.tokens, options.observed)
            for _ in range(options.rounds)
        ]
        step, cycle, gap = (min(each) for each in zip(*rounds, strict=True))
        cells = f"{step * 1e3:.2f}", f"{cycle * 1e3:.2f}", f"{step / batch * 1e6:.0f}"
        table.add_row(str(batch), *cells, f"{gap * 1e3:.2f}")
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
    add("--observed", action="store_true", help="with controller and metrics, as in a server")
    add("--rounds", type=int, default=3, help="of which the least counts (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

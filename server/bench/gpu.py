"""Everything worth measuring on a GPU, in one command of at most ten minutes.

    python -m server.bench.gpu --out results/gpu.json

In this order, so that what matters most is done if time runs out: the Triton kernels are compared
with the portable attention, and if they differ in the type that is measured, all else is measured
without them; forwards of Llama-3.2-1B and Llama-3.1-8B in their published shapes with random
weights, by transformers, by the forward written out and as CUDA graphs, against what reading the
weights takes; their cycles without and with the engine; the default pair's real texts, where its
weights are there; the time of attention; and the forwards as graphs of compiled layers.

Random weights say how long a step takes, nothing about how often a proposal is accepted. Figures
are written after every part. `--tiny` runs the same on small shapes, on any machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from server.bench.gpu_engine import time_engine_cycles, time_pair
from server.bench.gpu_forward import (
    Limits,
    make_rows,
    time_compiled,
    time_cycles,
    time_forwards,
)
from server.bench.gpu_kernels import check_kernels, time_kernels
from server.bench.gpu_models import Load, Member
from server.bench.gpu_report import print_results
from server.bench.gpu_timing import measure_bandwidth, measure_products
from server.bench.machine import describe_machine, describe_versions, git_hash
from server.runner.attention import ShortAttention
from server.runner.attention_choice import choose_attention
from server.runner.base import ModelRunner
from server.runner.torch_runner import TorchRunner

# Prompt and text of the configured pair.
PAIR_MAX_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is.

    Attributes:
        members: keys of SIZES, proposer and expert.
        batches: numbers of sequences.
        context: tokens consumed before.
        gamma: tokens proposed.
        check_limit: cases of each type that the kernels are checked on; None: all.
        attention_shapes: (sequences, length, tokens each) that attention is timed on.
        copied_bytes, product_side: of what the device's limits are measured with.
        engine_tokens, pair_tokens: made for each sequence.
        pair_batches: numbers of sequences of the default pair.
    """

    members: tuple[str, str]
    batches: tuple[int, ...]
    context: int
    gamma: int
    check_limit: int | None
    attention_shapes: tuple[tuple[int, int, int], ...]
    copied_bytes: int
    product_side: int
    engine_tokens: int
    pair_tokens: int
    pair_batches: tuple[int, ...]


FULL = Scale(
    members=("llama-3.2-1b", "llama-3.1-8b"),
    batches=(1, 8, 32, 64),
    context=1024,
    gamma=4,
    check_limit=None,
    attention_shapes=tuple(
        (batch, length, n) for batch in (1, 8, 16, 64) for length in (1024, 8192) for n in (1, 5)
    ),
    copied_bytes=2 << 30,
    product_side=8192,
    engine_tokens=12,
    pair_tokens=128,
    pair_batches=(1, 4, 16, 32),
)
TINY = Scale(
    members=("tiny-proposer", "tiny-expert"),
    batches=(1, 2),
    context=24,
    gamma=2,
    check_limit=1,
    attention_shapes=((1, 64, 1),),
    copied_bytes=1 << 20,
    product_side=64,
    engine_tokens=3,
    pair_tokens=4,
    pair_batches=(1, 2),
)


class Session:
    """One run: what is known so far, and how much time is left."""

    def __init__(self, out: Path, seconds: float) -> None:
        """Results go to `out`; `seconds` is when to begin nothing new."""
        self.results: dict[str, Any] = {
            "machine": describe_machine(),
            "versions": describe_versions(),
            "commit": git_hash(),
            "left_out": [],
            "log": [],
        }
        self._out = out
        self._end = time.monotonic() + seconds

    def may_go_on(self) -> bool:
        return time.monotonic() < self._end

    def part(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure and keep one part, unless time is up; what fails is kept as its error."""
        if not self.may_go_on():
            self.results["left_out"].append(f"{name}: no time left")
            return
        started = time.monotonic()
        self.log(name)
        try:
            self.results[name] = measure()
        except Exception as error:  # a part that fails must not cost the others
            self.results["left_out"].append(f"{name}: {type(error).__name__}: {error}"[:500])
            self.log(f"{name} failed: {error}")
        self.results.setdefault("part_seconds", {})[name] = time.monotonic() - started
        self.write()

    def write(self) -> None:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    def log(self, line: str) -> None:
        """Print a line, and keep it beside the results."""
        self.results["log"].append(line)
        print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


class RandomPair:
    """Two models of random weights, in parts of a session."""

    def __init__(
        self,
        session: Session,
        device: torch.device,
        dtype: torch.dtype,
        scale: Scale,
        kernels: ShortAttention | None,
        limits: Limits,
    ) -> None:
        self._session = session
        self._device = device
        self._dtype = dtype
        self._scale = scale
        self._kernels = kernels
        self._limits = limits
        self._load = Load(max(scale.batches), scale.context, 64, scale.gamma + 1)
        self._captures = device.type == "cuda" and kernels is not None
        self._members: list[Member] = []
        self._eager: list[TorchRunner] = []
        self._served: list[ModelRunner] = []

    def measure(self) -> None:
        """Forwards of each model, and cycles of both."""
        scale, session = self._scale, self._session
        for name in scale.members:
            session.part(f"forward {name}", partial(self._forwards, name))
        if len(self._served) < len(scale.members):
            session.results["left_out"].append("cycles: they need the forwards of both models")
            return
        pair = (self._served[0], self._served[1])
        session.part(
            "cycle", lambda: time_cycles(pair, self._floor, self._load, scale.batches, scale.gamma)
        )
        session.part(
            "engine cycle",
            lambda: time_engine_cycles(
                pair, scale.batches, scale.context, scale.gamma, scale.engine_tokens
            ),
        )

    def measure_compiled(self) -> None:
        """Add to the forwards what they take with compiled layers, which takes long to compile."""
        for member, runner in zip(self._members, self._eager, strict=True):
            rows = self._session.results[f"forward {member.name}"]
            self._session.part(
                f"compiled {member.name}",
                partial(
                    time_compiled,
                    rows,
                    member,
                    runner,
                    self._load,
                    self._captures,
                    self._session.log,
                ),
            )

    def _forwards(self, name: str) -> list[dict[str, Any]]:
        scale, session = self._scale, self._session
        member = Member(name, self._device, self._dtype, self._load, self._kernels)
        lengths = (1, 2, scale.gamma + 1)
        rows = make_rows(member, self._load, scale.batches, lengths, self._limits)
        session.results[f"forward {name}"] = rows  # now: what is measured before an error is kept
        eager, graphs = time_forwards(rows, member, self._load, self._captures, session.log)
        if graphs is None:
            session.results["left_out"].append(f"graphs of {name}: see the log; cycles are eager")
        self._members.append(member)
        self._eager.append(eager)
        self._served.append(graphs or eager)
        return rows

    def _floor(self, batch: int) -> float:
        """Of a cycle."""
        proposer, expert = self._members
        gamma, context = self._scale.gamma, self._scale.context
        steps = [(proposer, 2), *[(proposer, 1)] * (gamma - 1), (expert, gamma + 1)]
        return sum(self._limits.floor_seconds(m, batch, n, context) for m, n in steps)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, write and print; exits with 1 where a kernel is wrong or a part is missing."""
    options = _parse(argv)
    device, attention = torch.device(options.device), options.attention
    scale = TINY if options.tiny else FULL
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    session = Session(options.out, options.seconds)
    session.results["device"] = _describe(device)
    kernels = choose_attention(attention, device, session.log)
    if kernels is not None and not _kernels_are_right(session, kernels, device, dtype, scale):
        kernels, attention = None, "portable"
    session.results["attention of forwards"] = "torch" if kernels is None else "kernels"
    with torch.inference_mode():
        limits = _measure_limits(session, device, dtype, scale)
        random_pair = RandomPair(session, device, dtype, scale, kernels, limits)
        random_pair.measure()
    if not options.config.is_file() or not options.models.is_dir():
        session.results["left_out"].append(f"pair: {options.config} and {options.models} needed")
    else:
        _measure_pair(session, options.config, scale, options.device, attention)
    with torch.inference_mode():
        if kernels is not None:
            shapes, bandwidth = list(scale.attention_shapes), limits.bandwidth
            session.part(
                "attention", lambda: time_kernels(kernels, device, dtype, shapes, bandwidth)
            )
        random_pair.measure_compiled()
    session.write()
    print_results(session.results)
    if options.plot is not None:
        from server.bench.gpu_plot import plot_results  # matplotlib is needed for this only

        plot_results(session.results, options.plot)
    if session.results["left_out"]:
        sys.exit(1)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.bench.gpu")
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, default=Path("results/gpu.json"), help="(%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu", help="(%(default)s)")
    parser.add_argument(
        "--attention", choices=("auto", "portable", "triton"), default="auto", help="(%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=400, help="begin nothing new after them (%(default)s)"
    )
    parser.add_argument(
        "--config", type=Path, default=Path("configs/default.yaml"), help="pair (%(default)s)"
    )
    parser.add_argument(
        "--models", type=Path, default=Path("models"), help="its weights (%(default)s)"
    )
    parser.add_argument("--plot", type=Path, help="also draw, as PNG files in this directory")
    options = parser.parse_args(argv)
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if options.device == "cpu" and not options.tiny:
        parser.error("no GPU here: only --tiny runs on the CPU")
    return options


def _describe(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": str(device)}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def _kernels_are_right(
    session: Session,
    kernels: ShortAttention,
    device: torch.device,
    dtype: torch.dtype,
    scale: Scale,
) -> bool:
    """First of all: whether models of `dtype` are measured with them."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    if device.type == "cpu":  # interpreted, where bfloat16 is not multiplied rightly
        dtypes = [torch.float32]
    with torch.inference_mode():
        session.part("kernels", lambda: check_kernels(kernels, device, dtypes, scale.check_limit))
    rows = session.results.get("kernels", [])
    failed = [row["dtype"] for row in rows if not row["passed"]]
    if failed:
        session.results["left_out"].append(f"kernels: {len(failed)} of {len(rows)} cases failed")
    return bool(rows) and str(dtype).removeprefix("torch.") not in failed


def _measure_limits(
    session: Session, device: torch.device, dtype: torch.dtype, scale: Scale
) -> Limits:
    limits = Limits(
        measure_bandwidth(device, scale.copied_bytes),
        measure_products(device, dtype, scale.product_side),
    )
    session.results["limits"] = {
        "bytes_per_second": limits.bandwidth,
        "operations_per_second": limits.operations,
    }
    return limits


def _measure_pair(
    session: Session, config: Path, scale: Scale, device: str, attention: str
) -> None:
    overrides = [
        f"engine.attention={attention}",
        f"engine.max_length={PAIR_MAX_LENGTH}",
        f"engine.max_sequences={max(scale.pair_batches)}",
        *(f"models.{index}.device={device}" for index in (0, 1)),
    ]
    session.part(
        "pair",
        lambda: time_pair(
            config,
            scale.pair_batches,
            scale.pair_tokens,
            (0.0, 1.0),
            session.may_go_on,
            session.log,
            overrides,
        ),
    )


if __name__ == "__main__":
    main()

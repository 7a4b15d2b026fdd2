"""Forwards and cycles of two models, by batch and by the way they are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from server.bench.gpu_models import Load, Member
from server.bench.gpu_timing import median_seconds
from server.runner.base import Batch, ModelRunner
from server.runner.graph_runner import GraphRunner
from server.runner.torch_runner import TorchRunner

# Tried in this order; the server runs graphs, and of compiled layers where that is configured.
WAYS = ("transformers", "written out", "graphs", "compiled")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device does at best.

    Attributes:
        bandwidth: bytes a second.
        operations: of matrix products, a second.
    """

    bandwidth: float
    operations: float

    def floor_seconds(self, member: Member, batch: int, num_tokens: int, context: int) -> float:
        """Of a forward: reading weights and KV, or multiplying, whichever is longer."""
        size = member.bytes_read + batch * (context + num_tokens) * member.kv_bytes_per_token
        operations = 2 * member.num_parameters * batch * num_tokens
        return max(size / self.bandwidth, operations / self.operations)


def make_rows(
    member: Member, load: Load, batches: Sequence[int], lengths: Sequence[int], limits: Limits
) -> list[dict[str, Any]]:
    """One for each shape, `batches` times `lengths`, without its seconds."""
    return [
        {
            "model": member.name,
            "batch": batch,
            "num_tokens": num_tokens,
            "floor_seconds": limits.floor_seconds(member, batch, num_tokens, load.context),
            "seconds": {},
        }
        for batch in batches
        for num_tokens in lengths
    ]


def time_forwards(
    rows: list[dict[str, Any]],
    member: Member,
    load: Load,
    capture: bool,
    report: Callable[[str], None],
) -> tuple[TorchRunner, GraphRunner | None]:
    """Add seconds of a forward to `rows`, in each way but the last.

    Args:
        rows: of `make_rows`; what was measured before an error stays in them.
        member: whose weights are taken over.
        load: what its KV memory was made for.
        capture: CUDA graphs; False: padded shapes alone.
        report: takes one line for each phase.

    Returns:
        The runner written out, and its graphs; None where they could not be captured or run.
    """
    plain = member.plain()
    _fill(plain, load)
    _time(rows, WAYS[0], plain, load, report)
    fast = member.fast()
    fast.store = plain.store
    _time(rows, WAYS[1], fast, load, report)
    return fast, _time_graphs(rows, WAYS[2], member, fast, load, capture, report)


def time_compiled(
    rows: list[dict[str, Any]],
    member: Member,
    fast: TorchRunner,
    load: Load,
    capture: bool,
    report: Callable[[str], None],
) -> bool:
    """Add the last way to `rows` of `time_forwards`; False where layers cannot be compiled or run.

    Args:
        rows: of `member`.
        member: whose layers are compiled for as long as this takes.
        fast: its forward written out.
        load: see `time_forwards`.
        capture: see there.
        report: see there.
    """
    with member.compiled(report) as is_compiled:
        if not is_compiled:
            return False
        return _time_graphs(rows, WAYS[3], member, fast, load, capture, report) is not None


def _time_graphs(
    rows: list[dict[str, Any]],
    way: str,
    member: Member,
    fast: TorchRunner,
    load: Load,
    capture: bool,
    report: Callable[[str], None],
) -> GraphRunner | None:
    """As `time_forwards`; no eager forward is ever timed as a graph."""
    try:
        graphs = member.graphs(fast, capture)
        graphs.warm_up(report)
        if capture and not graphs.num_graphs:
            return None
        _time(rows, way, graphs, load, report)
    except Exception as error:  # compilers and captures fail in many ways; the rest is kept
        report(f"{member.name}: {way} fail: {error}")
        for row in rows:
            row["seconds"].pop(way, None)
        return None
    return graphs


def time_cycles(
    members: tuple[ModelRunner, ModelRunner],
    floors: Callable[[int], float],
    load: Load,
    batches: Sequence[int],
    gamma: int,
) -> list[dict[str, Any]]:
    """Seconds of the forwards of one cycle, nothing read back until the end.

    The first model feeds two tokens, then one token `gamma - 1` times; the second scores all and
    one more. Choosing tokens is not in it: each step feeds tokens that are known beforehand.

    Args:
        members: proposer and expert.
        floors: seconds at least, by batch.
        load: what their KV memory was made for.
        batches: numbers of sequences.
        gamma: tokens proposed.
    """
    proposer, expert = members
    rows = []
    for size in batches:
        first, then = (load.batch_of(size, n, proposer.vocab_size) for n in (2, 1))
        scored = load.batch_of(size, gamma + 1, expert.vocab_size)

        steps = [(proposer, first), *[(proposer, then)] * (gamma - 1), (expert, scored)]
        seconds = median_seconds(partial(_run_all, steps), expert.device)
        rows.append({"batch": size, "seconds": seconds, "floor_seconds": floors(size)})
    return rows


def _time(
    rows: list[dict[str, Any]],
    way: str,
    runner: ModelRunner,
    load: Load,
    report: Callable[[str], None],
) -> None:
    report(f"{runner.name}: timing {len(rows)} shapes, {way}")
    for row in rows:
        batch = load.batch_of(row["batch"], row["num_tokens"], runner.vocab_size)
        row["seconds"][way] = median_seconds(partial(runner.forward, batch), runner.device)


def _fill(runner: TorchRunner, load: Load) -> None:
    """Memory of the texts with random numbers: with zeros the same products take less time."""
    runner.forward(load.batch_of(1, 1, runner.vocab_size))  # allocates it
    for layer in range(runner.store.num_layers):
        for part in runner.store.slots(layer):
            part.normal_()


def _run_all(steps: list[tuple[ModelRunner, Batch]]) -> None:
    for runner, batch in steps:
        runner.forward(batch)

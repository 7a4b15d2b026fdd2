"""Tokens kept by each way of verifying, on synthetic pairs, and what it costs.

    python -m server.bench.verification --lengths 2,4,8

A pair has random logits, new at every position: the target's are normal, the proposer's are the
same plus noise, as much as the wanted acceptance takes. Both ways decide the same drafts with the
same uniforms. The time is CPU time of one thread for one window, softmax not included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from server.bench.machine import describe_machine, describe_versions
from server.bench.strategy_spec import parse_concurrency
from server.decoding.verify import Decisions, sample, verify, verify_blocks

NOISES = (0.5, 1.0, 1.5)
_SPREAD = 3.0
_WINDOWS_AT_ONCE = 50


@dataclass(frozen=True, slots=True)
class Kept:
    """Means over windows of one length.

    Attributes:
        acceptance: sum of min(r, g) at a position.
        by_token, by_block: proposals kept of a window.
    """

    acceptance: float
    by_token: float
    by_block: float

    @property
    def gain(self) -> float:
        """Of tokens per verification, the one that is recovered or drawn behind it included."""
        return (1 + self.by_block) / (1 + self.by_token) - 1


def measure(length: int, noise: float, num_windows: int, vocab_size: int, seed: int = 0) -> Kept:
    """Decide `num_windows` windows of `length` both ways."""
    random = torch.Generator().manual_seed(seed)
    acceptance = by_token = by_block = 0.0
    num_batches = max(1, num_windows // _WINDOWS_AT_ONCE)
    for _ in range(num_batches):
        decide, overlap = _drafts(length, noise, _WINDOWS_AT_ONCE, vocab_size, random)
        acceptance += overlap
        by_token += _mean_kept(decide(verify))
        by_block += _mean_kept(decide(verify_blocks))
    return Kept(acceptance / num_batches, by_token / num_batches, by_block / num_batches)


def seconds(length: int, vocab_size: int, rounds: int) -> tuple[float, float]:
    """CPU seconds of one window by token and by block, least of `rounds`."""
    random = torch.Generator().manual_seed(0)
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        decide, _ = _drafts(length, NOISES[0], 1, vocab_size, random)
        for way, rule in enumerate((verify, verify_blocks)):
            started = time.process_time()
            decide(rule)
            best[way] = min(best[way], time.process_time() - started)
    return best[0], best[1]


def _drafts(
    length: int, noise: float, num_windows: int, vocab_size: int, random: torch.Generator
) -> tuple[Callable[[Callable[..., Decisions]], Decisions], float]:
    """Windows that wait for a rule to decide them, and their mean acceptance."""
    num_rows = length * num_windows

    def normal() -> Tensor:
        return torch.randn(num_rows, vocab_size, generator=random)

    logits = normal() * _SPREAD
    r, g = logits.softmax(-1), (logits + normal() * noise).softmax(-1)
    draw, accept, recover = (torch.rand(num_rows, generator=random) for _ in range(3))
    tokens = sample(g, draw)
    lengths = [length] * num_windows

    def decide(rule: Callable[..., Decisions]) -> Decisions:
        return rule(r, g, tokens, lengths, accept, recover)

    return decide, float(torch.minimum(r, g).sum(-1).mean())


def _mean_kept(decisions: Decisions) -> float:
    return float(decisions[:, 0].float().mean())


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="Token and block verification, side by side.")
    parser.add_argument("--lengths", type=parse_concurrency, default=(2, 4, 8))
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--vocab", type=int, default=1000, help="of the pairs that are counted")
    parser.add_argument("--timed-vocab", type=int, default=49_152)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    machine, versions = describe_machine(), describe_versions()
    console.print(f"{machine['cpu']}, torch {versions['torch']}, 1 thread")
    kept = Table("gamma", "acceptance", "token", "block", "gain", box=SIMPLE_HEAD)
    for length in args.lengths:
        for noise in NOISES:
            pair = measure(length, noise, args.windows, args.vocab)
            kept.add_row(
                str(length),
                f"{pair.acceptance:.2f}",
                f"{pair.by_token:.3f}",
                f"{pair.by_block:.3f}",
                f"{pair.gain:+.1%}",
            )
    console.print(kept)
    cost = Table("gamma", "token, ms", "block, ms", box=SIMPLE_HEAD)
    for length in args.lengths:
        by_token, by_block = seconds(length, args.timed_vocab, 10)
        cost.add_row(str(length), f"{by_token * 1e3:.2f}", f"{by_block * 1e3:.2f}")
    console.print(cost)


if __name__ == "__main__":
    main()

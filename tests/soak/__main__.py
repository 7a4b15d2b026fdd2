"""python -m tests.soak --seconds 1200 --out soak.json: exit code 1 where anything is wrong."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.soak.server import serve
from tests.soak.soak import soak

MAX_GROWTH = 0.05


def faults(figures: dict[str, Any], max_growth: float = MAX_GROWTH) -> list[str]:
    """What must not be."""
    wrong = [f"{len(figures['problems'])} problems"] if figures["problems"] else []
    for name in ("http_5xx", "engine_faults", "pages_used_at_the_end", "tracebacks_in_the_log"):
        if figures[name]:
            wrong.append(f"{name}: {figures[name]}")
    if figures["memory"]["growth"] > max_growth:
        wrong.append(f"memory grew by {figures['memory']['growth']:.1%}")
    return wrong


def table(figures: dict[str, Any]) -> str:
    """What docs/reliability.md says of a soak, as Markdown."""
    memory, machine = figures["memory"], figures["machine"]
    load = ", ".join(f"{each:.1f}" for each in machine["load_average"])
    rows: list[tuple[str, object]] = [
        ("machine", f"{machine['cores']} cores of {machine['cpu']}; load average {load}"),
        ("seconds, clients", f"{figures['seconds']:g}, {figures['clients']}"),
        *figures["requests"].items(),
        (
            "tokens generated, preemptions",
            f"{figures['generated_tokens']:g}, {figures['preemptions']:g}",
        ),
        (
            "resident memory after the warm-up, at the end",
            f"{memory['resident_mib_after_warm_up']} MiB, {memory['resident_mib_at_the_end']} MiB "
            f"({memory['growth']:+.1%})",
        ),
        ("answers 5xx under load", figures["http_5xx"]),
        (
            "pages in use, engine faults, tracebacks at the end",
            f"{figures['pages_used_at_the_end']:g}, {figures['engine_faults']:g}, "
            f"{figures['tracebacks_in_the_log']}",
        ),
        *(
            (
                f"{name}: p50, p99, longest of {times['count']}",
                f"{times['p50_ms']} ms, {times['p99_ms']} ms, {times['max_ms']} ms",
            )
            for name, times in figures["probes"].items()
        ),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1200, help="of load (%(default)s)")
    parser.add_argument("--clients", type=int, default=48, help="at once (%(default)s)")
    parser.add_argument("--pool", type=int, default=300, help="distinct requests (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as server:
        figures = soak(
            server,
            seconds=options.seconds,
            num_clients=options.clients,
            pool_size=options.pool,
            seed=options.seed,
        )
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n\n" + table(figures) + "\n")
    for line in (wrong := faults(figures)):
        sys.stderr.write(f"soak: {line}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

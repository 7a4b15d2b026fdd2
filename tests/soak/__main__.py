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
    sys.stdout.write(text + "\n")
    for line in (wrong := faults(figures)):
        sys.stderr.write(f"soak: {line}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

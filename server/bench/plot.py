"""Pictures of the results of `server.bench.grid` and `server.bench.lockstep`; needs matplotlib.

    python -m server.bench.plot docs/results/grid.json --out docs/
    python -m server.bench.plot --lockstep docs/results/lockstep.json --out docs/

The first writes speedup.png, gamma.png and acceptance.png: the ratio to standard and the mean
proposal length against concurrency, and the share of proposals accepted at each place of a window;
the second lockstep.png, the ratio of `auto` to standard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from server.bench.grid import KINDS, Key, cells_of, read_grid
from server.bench.result_file import read_document
from server.bench.summary import Summary
from server.errors import CosError

Cells = dict[Key, Summary]
# By kind of decoding and label: values by requests in flight.
Curves = dict[str, dict[str, list[tuple[int, float]]]]
_RATIO = "x standard"


def plot_all(cells: Cells, directory: Path) -> list[Path]:
    """One PNG file for each table; returns their paths."""
    return [
        _against_concurrency(_curves(cells, _speedup), _RATIO, directory / "speedup.png", line=1.0),
        _against_concurrency(
            _curves(cells, _gamma), "mean proposal length", directory / "gamma.png"
        ),
        _by_position(cells, directory / "acceptance.png"),
    ]


def _speedup(summary: Summary) -> dict[str, float]:
    return {} if summary.ratio is None else {"": summary.ratio}


def _gamma(summary: Summary) -> dict[str, float]:
    """By model."""
    names = summary.acceptance_by_position
    lengths = zip(names, summary.gamma, strict=False)
    return {name: length for name, length in lengths if length is not None}


def _curves(cells: Cells, values: Callable[[Summary], dict[str, float]]) -> Curves:
    curves: Curves = {}
    for (kind, name, concurrency), summary in sorted(cells.items(), key=lambda cell: cell[0][2]):
        of_kind = curves.setdefault(kind, {})
        for part, value in values(summary).items():
            label = f"{name}, {part}" if part else name
            of_kind.setdefault(label, []).append((concurrency, value))
    return curves


def lockstep_curves(document: dict[str, Any]) -> Curves:
    """Tokens per second of `auto` by those of standard decoding."""
    curves: Curves = {}
    for cell in sorted(document["cells"], key=lambda cell: int(cell["in_flight"])):
        rates = {name: lane["num_tokens"] / lane["seconds"] for name, lane in cell["lanes"].items()}
        points = curves.setdefault(cell["kind"], {}).setdefault(cell["prompts"], [])
        points.append((cell["in_flight"], rates["auto"] / rates["standard"]))
    return curves


def _panels(measured: Collection[str], label: str) -> tuple[Any, dict[str, Any]]:
    """A figure with one panel for each kind that was measured."""
    kinds = [kind for kind in KINDS if kind in measured]
    figure, row = pyplot.subplots(
        1, len(kinds), figsize=(4 * len(kinds), 3.5), sharey=True, squeeze=False
    )
    row[0][0].set_ylabel(label)
    for kind, axes in zip(kinds, row[0], strict=True):
        axes.set_title(kind)
        axes.grid(alpha=0.3)
    return figure, dict(zip(kinds, row[0], strict=True))


def _against_concurrency(curves: Curves, label: str, path: Path, line: float | None = None) -> Path:
    figure, panels = _panels(curves, label)
    every = [points for of_kind in curves.values() for points in of_kind.values()]
    ticks = sorted({concurrency for points in every for concurrency, _ in points})
    for kind, axes in panels.items():
        for label_of, points in curves[kind].items():
            axes.plot(*zip(*points, strict=True), marker="o", label=label_of)
        if line is not None:
            axes.axhline(line, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("requests in flight")
    return _save(figure, panels, path)


def _by_position(cells: Cells, path: Path) -> Path:
    """Of the cells with fewest requests in flight, where windows are longest."""
    figure, panels = _panels({key[0] for key in cells}, "accepted / verified proposals")
    for kind, axes in panels.items():
        least = min(key[2] for key in cells if key[0] == kind)
        for (of_kind, name, concurrency), summary in cells.items():
            if (of_kind, concurrency) == (kind, least):
                for model, shares in summary.acceptance_by_position.items():
                    known = [(i, share) for i, share in enumerate(shares, 1) if share is not None]
                    if known:
                        axes.plot(*zip(*known, strict=True), marker="o", label=f"{name}, {model}")
        axes.set_xlabel(f"place in the window ({least} in flight)")
        axes.set_ylim(0, 1.05)
    return _save(figure, panels, path)


def _save(figure: Any, panels: dict[str, Any], path: Path) -> Path:
    for axes in panels.values():
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.tight_layout()
    # Without the version of the library, the same figures give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 for files that are no results."""
    parser = argparse.ArgumentParser(prog="python -m server.bench.plot")
    parser.add_argument("results", type=Path, nargs="*", help="of server.bench.grid")
    parser.add_argument("--lockstep", type=Path, help="results of server.bench.lockstep")
    parser.add_argument("--out", type=Path, required=True, help="directory of the pictures")
    options = parser.parse_args(argv)
    try:
        documents = [read_grid(path) for path in options.results]
        lockstep = read_document(options.lockstep) if options.lockstep else {"cells": []}
    except CosError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    cells = {key: each[1] for document in documents for key, each in cells_of(document)}
    curves = lockstep_curves(lockstep)
    if not cells and not curves:
        print("error: no cell was measured", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    paths = plot_all(cells, options.out) if cells else []
    if curves:
        picture = options.out / "lockstep.png"
        paths.append(_against_concurrency(curves, _RATIO, picture, line=1.0))
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

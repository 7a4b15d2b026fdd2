"""Pictures of the results of `server.bench.grid`; needs matplotlib.

    python -m server.bench.plot docs/results/grid.json --out docs/

writes speedup.png, gamma.png and acceptance.png: the ratio to standard and the mean proposal length
against concurrency, and the share of proposals accepted at each place of a window.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from server.bench.grid import KINDS, Key, cells_of, read_grid
from server.bench.summary import Summary
from server.errors import CosError

Cells = dict[Key, Summary]


def plot_all(cells: Cells, directory: Path) -> list[Path]:
    """One PNG file for each table; returns their paths."""
    return [
        _against_concurrency(cells, "x standard", _speedup, directory / "speedup.png", line=1.0),
        _against_concurrency(cells, "mean proposal length", _gamma, directory / "gamma.png"),
        _by_position(cells, directory / "acceptance.png"),
    ]


def _speedup(summary: Summary) -> dict[str, float]:
    return {} if summary.ratio is None else {"": summary.ratio}


def _gamma(summary: Summary) -> dict[str, float]:
    """By model."""
    names = summary.acceptance_by_position
    lengths = zip(names, summary.gamma, strict=False)
    return {name: length for name, length in lengths if length is not None}


def _panels(cells: Cells, label: str) -> tuple[Any, dict[str, Any]]:
    """A figure with one panel for each kind that was measured."""
    kinds = [kind for kind in KINDS if any(key[0] == kind for key in cells)]
    figure, row = pyplot.subplots(
        1, len(kinds), figsize=(4 * len(kinds), 3.5), sharey=True, squeeze=False
    )
    row[0][0].set_ylabel(label)
    for kind, axes in zip(kinds, row[0], strict=True):
        axes.set_title(kind)
        axes.grid(alpha=0.3)
    return figure, dict(zip(kinds, row[0], strict=True))


def _against_concurrency(
    cells: Cells,
    label: str,
    values: Callable[[Summary], dict[str, float]],
    path: Path,
    line: float | None = None,
) -> Path:
    figure, panels = _panels(cells, label)
    ticks = sorted({concurrency for _, _, concurrency in cells})
    for kind, axes in panels.items():
        curves: dict[str, list[tuple[int, float]]] = {}
        for (of_kind, name, concurrency), summary in sorted(cells.items(), key=lambda c: c[0][2]):
            for part, value in values(summary).items() if of_kind == kind else ():
                label = f"{name}, {part}" if part else name
                curves.setdefault(label, []).append((concurrency, value))
        for label_of, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=label_of)
        if line is not None:
            axes.axhline(line, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("requests in flight")
    return _save(figure, panels, path)


def _by_position(cells: Cells, path: Path) -> Path:
    """Of the cells with fewest requests in flight, where windows are longest."""
    figure, panels = _panels(cells, "accepted / verified proposals")
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
    parser.add_argument("results", type=Path, nargs="+", help="of server.bench.grid")
    parser.add_argument("--out", type=Path, required=True, help="directory of the pictures")
    options = parser.parse_args(argv)
    try:
        documents = [read_grid(path) for path in options.results]
    except CosError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    cells = {key: each[1] for document in documents for key, each in cells_of(document)}
    if not cells:
        print("error: no cell was measured", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    for path in plot_all(cells, options.out):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

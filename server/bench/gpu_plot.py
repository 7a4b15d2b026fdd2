"""The results of `server.bench.gpu` as pictures; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def plot_results(results: dict[str, Any], directory: Path) -> list[Path]:
    """One PNG file for each part that was measured; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = [
        _plot_forwards(name, rows, directory)
        for name, rows in results.items()
        if name.startswith("forward ")
    ]
    if results.get("cycle"):
        written.append(_plot_cycles(results, directory))
    if results.get("pair"):
        written.append(_plot_pair(results["pair"], directory))
    return written


def _plot_forwards(name: str, rows: list[dict[str, Any]], directory: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(7, 4))
    labels = [f"{row['batch']}x{row['num_tokens']}" for row in rows]
    for way in rows[0]["seconds"]:
        axes.plot(labels, [row["seconds"][way] * 1e3 for row in rows], marker="o", label=way)
    axes.plot(labels, [row["floor_seconds"] * 1e3 for row in rows], "k--", label="floor")
    axes.set(title=f"{name}, random weights", xlabel="sequences x tokens each", ylabel="ms")
    return _save(figure, axes, directory / f"gpu-{name.replace(' ', '-')}.png")


def _plot_cycles(results: dict[str, Any], directory: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(7, 4))
    rows = results["cycle"]
    batches = [row["batch"] for row in rows]
    axes.plot(batches, [row["seconds"] * 1e3 for row in rows], marker="o", label="forwards")
    axes.plot(batches, [row["floor_seconds"] * 1e3 for row in rows], "k--", label="floor")
    if engine := results.get("engine cycle"):
        cycles = [row["cos"]["cycle_seconds"] * 1e3 for row in engine]
        axes.plot([row["batch"] for row in engine], cycles, marker="s", label="engine")
    axes.set(title="One cycle, random weights", xlabel="sequences", ylabel="ms")
    return _save(figure, axes, directory / "gpu-cycle.png")


def _plot_pair(rows: list[dict[str, Any]], directory: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(7, 4))
    strategies = [key for key in rows[0] if key not in ("batch", "temperature", "standard")]
    for temperature in dict.fromkeys(row["temperature"] for row in rows):
        chosen = [row for row in rows if row["temperature"] == temperature]
        for strategy in strategies:
            ratios = [
                row[strategy]["tokens_per_second"] / row["standard"]["tokens_per_second"]
                for row in chosen
            ]
            label = f"{strategy}, temperature {temperature}"
            axes.plot([row["batch"] for row in chosen], ratios, marker="o", label=label)
    axes.axhline(1.0, color="k", linestyle="--")
    axes.set(title="Speedup over standard", xlabel="sequences", ylabel="ratio")
    return _save(figure, axes, directory / "gpu-pair.png")


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path

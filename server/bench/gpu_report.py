"""The results of `server.bench.gpu` as tables."""

from __future__ import annotations

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

# Of the random models nothing is known; this is what a cycle would yield if so many were accepted.
ASSUMED_ACCEPTANCE = 0.8


def print_results(results: dict[str, Any]) -> None:
    """Whatever parts there are."""
    console = Console(width=max(Console().width, 110))
    console.print(f"{results['device']}, {results['versions']}")
    if "limits" in results:
        limits = results["limits"]
        console.print(
            f"measured here: copying {limits['bytes_per_second'] / 1e12:.2f} TB/s, matrix products "
            f"{limits['operations_per_second'] / 1e12:.0f} TFLOP/s; the floors follow from these"
        )
    for table in tables(results):
        console.print(table)
    for line in results["left_out"]:
        console.print(f"left out: {line}")


def tables(results: dict[str, Any]) -> list[Table]:
    """One for each part that was measured."""
    found = []
    if "kernels" in results:
        found.append(_kernels(results["kernels"]))
    if "attention" in results:
        found.append(_attention(results["attention"]))
    for name, rows in results.items():
        if name.startswith("forward "):
            found.append(_forwards(name, rows))
    if "cycle" in results:
        found.append(_cycles(results["cycle"], results.get("engine cycle", [])))
    if "pair" in results:
        found.append(_pair(results["pair"]))
    return found


def expected_tokens(acceptance: float, gamma: int) -> float:
    """Of one cycle, if each proposal is accepted with this probability, independently."""
    return sum(acceptance**i for i in range(gamma + 1))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _kernels(rows: list[dict[str, Any]]) -> Table:
    table = _table("Triton against portable attention", "type", "cases", "worst", "failed")
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_type = [row for row in rows if row["dtype"] == dtype]
        failed = sum(not row["passed"] for row in of_type)
        worst = max((row["difference"] for row in of_type if "difference" in row), default=math.nan)
        table.add_row(dtype, str(len(of_type)), f"{worst:.1e}", str(failed))
    return table


def _attention(rows: list[dict[str, Any]]) -> Table:
    columns = ("batch", "length", "tokens", "portable ms", "kernel ms", "ratio", "of bandwidth")
    table = _table("Attention of one layer, 32 query and 8 KV heads of 128", *columns)
    for row in rows:
        kernel, portable = row["kernel_seconds"], row["portable_seconds"]
        shape = (str(row[key]) for key in ("batch", "length", "num_tokens"))
        share = f"{row['bandwidth_share']:.0%}"
        table.add_row(*shape, _ms(portable), _ms(kernel), f"{portable / kernel:.1f}", share)
    return table


def _forwards(title: str, rows: list[dict[str, Any]]) -> Table:
    # Of a way that broke off some shapes were not measured.
    ways = list(dict.fromkeys(way for row in rows for way in row["seconds"]))
    columns = ("batch", "tokens", "floor ms", *(f"{way} ms" for way in ways), "floor / best")
    table = _table(f"{title}, random weights", *columns)
    for row in rows:
        seconds = row["seconds"]
        share = f"{row['floor_seconds'] / min(seconds.values()):.0%}" if seconds else ""
        shape = (str(row["batch"]), str(row["num_tokens"]), _ms(row["floor_seconds"]))
        cells = [_ms(seconds[way]) if way in seconds else "" for way in ways]
        table.add_row(*shape, *cells, share)
    return table


def _cycles(rows: list[dict[str, Any]], engine_rows: list[dict[str, Any]]) -> Table:
    title = "One cycle, random weights"
    columns = ("batch", "floor ms", "forwards ms", "engine ms", "standard: a token ms")
    table = _table(title, *columns, f"tokens/s if {ASSUMED_ACCEPTANCE} were accepted")
    by_batch = {row["batch"]: row for row in engine_rows}
    for row in rows:
        cells = [str(row["batch"]), _ms(row["floor_seconds"]), _ms(row["seconds"])]
        if (engine := by_batch.get(row["batch"])) is not None:
            cycle = engine["cos"]["cycle_seconds"]
            tokens = row["batch"] * expected_tokens(ASSUMED_ACCEPTANCE, engine["gamma"])
            cells += [_ms(cycle), _ms(engine["standard"]["cycle_seconds"]), f"{tokens / cycle:.0f}"]
        table.add_row(*cells)
    return table


def _pair(rows: list[dict[str, Any]]) -> Table:
    strategies = [key for key in rows[0] if key not in ("batch", "temperature")] if rows else []
    columns = [f"{strategy} tokens/s" for strategy in strategies]
    ratios = [f"{strategy} ratio" for strategy in strategies[1:]]
    table = _table("The configured pair, contrastive", "temperature", "batch", *columns, *ratios)
    for row in rows:
        speeds = [row[strategy]["tokens_per_second"] for strategy in strategies]
        ratio_cells = [f"{speed / speeds[0]:.2f}" if speeds[0] else "" for speed in speeds[1:]]
        speed_cells = [f"{speed:.0f}" for speed in speeds]
        table.add_row(f"{row['temperature']}", str(row["batch"]), *speed_cells, *ratio_cells)
    return table

"""Results as JSON, as a table in the terminal and as Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table

from server.bench.closed_loop import BlockResult
from server.bench.machine import describe_machine, describe_versions, git_hash
from server.bench.settings import Settings
from server.bench.summary import Summary
from server.errors import ConfigError

FORMAT = 1  # raise when readers of older files would misread newer ones

COLUMNS = (
    "prompts",
    "concurrency",
    "strategy",
    "tokens/s",
    "TTFT p50 / p99 ms",
    "ms/token p50 / p99",
    "acceptance",
    "tokens/forward",
    "× standard",
    "decode only",
    "estimated",
)
_NARROW_COLUMNS = (
    "strategy",
    "tokens/s",
    "TTFT ms\np50 / p99",
    "ms/token\np50 / p99",
    "accep-\ntance",
    "tokens/\nforward",
    "× standard\n(rounds)",
    "decode\nonly",
    "esti-\nmated",
)


def make_document(
    settings: Settings, server: dict[str, Any], results: Sequence[BlockResult], summaries: Any
) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat the run."""
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_hash(),
        "versions": describe_versions(),
        "machine": describe_machine(),
        "server": server,
        "settings": _describe_settings(settings),
        "summaries": [dataclasses.asdict(summary) for summary in summaries],
        "blocks": [_describe_block(result) for result in results],
        "requests": [dataclasses.asdict(row) for result in results for row in result.rows],
    }


def _describe_settings(settings: Settings) -> dict[str, Any]:
    described = dataclasses.asdict(settings)
    described["prompt_sets"] = [each.name for each in settings.prompt_sets]
    return described


def _describe_block(result: BlockResult) -> dict[str, Any]:
    described = dataclasses.asdict(result)
    del described["rows"]
    return {**described, "num_tokens": result.num_tokens}


def read_summaries(path: Path) -> list[Summary]:
    """The summaries of a result file. Raises ConfigError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ConfigError(f"{path}: format {document['format']}, expected {FORMAT}")
        return [Summary(**summary) for summary in document["summaries"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no result of this benchmark: {error}") from error


def terminal_tables(summaries: Iterable[Summary]) -> Iterator[Table]:
    """One for each prompt set and concurrency; narrow, for terminals."""
    for (name, concurrency), rows in groupby(summaries, lambda s: (s.prompt_set, s.concurrency)):
        title = f"{name}, {concurrency} in flight"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, column in enumerate(_NARROW_COLUMNS):
            justify: JustifyMethod = "right" if index else "left"
            table.add_column(column, justify=justify, no_wrap=True)
        for row in rows:
            table.add_row(*cells(row)[2:], style="red" if row.num_errors else None)
        yield table


def markdown_table(summaries: Iterable[Summary]) -> str:
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(cells(summary) for summary in summaries)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cells(summary: Summary) -> tuple[str, ...]:
    """One row, in the order of COLUMNS."""
    failed = f" ({summary.num_errors} failed)" if summary.num_errors else ""
    return (
        summary.prompt_set,
        str(summary.concurrency),
        summary.strategy + _chosen(summary) + failed,
        f"{summary.tokens_per_second:.1f}",
        f"{_ms(summary.ttft_p50)} / {_ms(summary.ttft_p99)}",
        f"{_ms(summary.token_p50)} / {_ms(summary.token_p99)}",
        _by_model(summary.acceptance),
        _by_model(summary.tokens_per_forward),
        _ratio(summary),
        _number(summary.decode_ratio),
        _number(summary.estimated_ratio),
    )


def _chosen(summary: Summary) -> str:
    """What auto took, ` → cos 90% standard 10%`; nothing where there was no choice."""
    shares = " ".join(f"{name} {share:.0%}" for name, share in summary.used.items())
    return f" → {shares}" if shares and summary.strategy.startswith("auto") else ""


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _by_model(values: list[float | None]) -> str:
    return " ".join(_number(value) for value in values) or "–"


def _ratio(summary: Summary) -> str:
    if summary.ratio is None:
        return "–"
    spread = f" ({_number(summary.ratio_low)}–{_number(summary.ratio_high)})"
    return _number(summary.ratio) + (spread if summary.ratio_low != summary.ratio_high else "")

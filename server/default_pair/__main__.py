"""`python -m server.default_pair`: write the default pair's model directories."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeElapsedColumn

from server.default_pair.build import Progress, build_pair
from server.default_pair.gguf_source import SourceMissing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m server.default_pair", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models"), help="where to write (models)")
    parser.add_argument("--force", action="store_true", help="write even if up to date")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        written = _build(options.out, options.force, console)
    except SourceMissing as error:
        console.print(f"[red]error:[/] {error}", soft_wrap=True)
        return 1
    for directory in written:
        console.print(f"wrote {directory}", soft_wrap=True)
    if not written:
        console.print(f"models under {options.out} are up to date", soft_wrap=True)
    return 0


def _build(out: Path, force: bool, console: Console) -> list[Path]:
    columns = (TextColumn("building the default pair"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("build", total=None)
        progress = Progress(
            total=lambda count: bar.update(task, total=count), step=lambda: bar.advance(task)
        )
        return build_pair(out, force, progress)


if __name__ == "__main__":
    sys.exit(main())

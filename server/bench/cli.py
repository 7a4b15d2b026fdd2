"""`cos-server bench`: measure a running server, or print results as Markdown."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
from pathlib import Path

from rich.console import Console

from server.bench.prompts import BUNDLED, load_prompts
from server.bench.report import make_document, markdown_table, read_summaries, terminal_tables
from server.bench.session import Target, measure
from server.bench.settings import Settings
from server.bench.strategy_spec import parse_concurrency, parse_object, parse_strategies
from server.bench.summary import summarise
from server.errors import ConfigError, CosError

_TABLE_WIDTH = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `cos-server bench`."""
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="the server (%(default)s)")
    add("--model", help="model name to ask for; the server's first one if not given")
    add(
        "--prompts",
        action="append",
        metavar="FILE|NAME",
        help=f'JSON lines with a "prompt", or one of {", ".join(BUNDLED)}; repeatable (humaneval)',
    )
    add("--num-prompts", type=_positive, default=16, help="requests per point (%(default)s)")
    add("--max-tokens", type=_positive, default=128, help="tokens per request (%(default)s)")
    add("--concurrency", default="1", help="requests in flight, as in 1,4,16 (%(default)s)")
    add(
        "--strategies",
        default="standard,auto",
        help="comma-separated, options after colons: cos:gamma=4, cos:gamma=4/2 (one for each "
        "model), mixture:kappa=2:shared_coins=true (%(default)s)",
    )
    add("--temperature", type=float, default=1.0, help="0 is greedy (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the first prompt (%(default)s)")
    add(
        "--seeds",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="send seeds, which fix each text; without them auto may take mixtures, and proposals "
        "are accepted more often",
    )
    add("--combination", metavar="JSON", help="combination to ask for instead of the server's")
    add(
        "--body",
        metavar="JSON",
        help="further fields of every request, as in "
        """'{"response_format": {"type": "json_object"}}'""",
    )
    add("--rounds", type=_positive, default=4, help="interleaved blocks (%(default)s)")
    add("--warmup", type=int, default=1, help="uncounted waves before each point (%(default)s)")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="generate --max-tokens tokens whatever the text, so that lengths are equal",
    )
    add("--timeout", type=float, default=600.0, help="seconds without a byte (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="write everything measured as JSON")
    add(
        "--table",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing: print results of --out as a Markdown table",
    )


def run(args: argparse.Namespace) -> int:
    """0; 1 where a request failed or the server could not be asked; 2 for wrong options."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per request at INFO
    errors = Console(stderr=True, soft_wrap=True)
    try:
        return _print_tables(args.table) if args.table else _measure(args, errors)
    except CosError as error:
        errors.print(f"error: {error}", style="red", markup=False)
        return 2 if isinstance(error, ConfigError) else 1


def _print_tables(paths: list[Path]) -> int:
    summaries = [summary for path in paths for summary in read_summaries(path)]
    print(markdown_table(summaries))
    return 0


def _measure(args: argparse.Namespace, console: Console) -> int:
    settings = make_settings(args)
    if args.out is not None and not args.out.resolve().parent.is_dir():
        raise ConfigError(f"--out {args.out}: no such directory")
    if args.out is not None and args.out.is_dir():
        raise ConfigError(f"--out {args.out}: is a directory")
    target = Target(args.base_url, args.model, args.timeout)
    server, results = asyncio.run(measure(target, settings, console))
    summaries = summarise(results)
    # Rather broken by a narrow terminal than with figures cut off.
    output = Console(width=max(Console().width, _TABLE_WIDTH))
    for table in terminal_tables(summaries):
        output.print(table)
    if args.out is not None:
        document = make_document(settings, server, results, summaries)
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    failed = [row for result in results for row in result.rows if row.error is not None]
    for row in failed[:5]:
        console.print(f"failed: {row.strategy}: {row.error}", style="red", markup=False)
    if failed:
        console.print(f"{len(failed)} requests failed", style="red")
    return 1 if failed else 0


def make_settings(args: argparse.Namespace) -> Settings:
    """Raises ConfigError."""
    if args.num_prompts < args.rounds:
        raise ConfigError(f"--num-prompts {args.num_prompts} is less than --rounds {args.rounds}")
    concurrency = parse_concurrency(args.concurrency)
    if (per_round := args.num_prompts // args.rounds) < max(concurrency):
        raise ConfigError(
            f"--num-prompts {args.num_prompts} in --rounds {args.rounds} are {per_round} a round: "
            f"--concurrency {max(concurrency)} would not be reached"
        )
    if args.warmup < 0:
        raise ConfigError(f"--warmup {args.warmup}: must not be negative")
    sources = args.prompts or [BUNDLED[0]]
    combination = parse_object(args.combination, "--combination")
    return Settings(
        prompt_sets=tuple(load_prompts(source) for source in dict.fromkeys(sources)),
        strategies=parse_strategies(args.strategies, combination),
        concurrency=concurrency,
        num_prompts=args.num_prompts,
        rounds=args.rounds,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
        warmup=args.warmup,
        send_seeds=args.seeds,
        body=parse_object(args.body, "--body") or {},
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value

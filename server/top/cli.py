"""cos-server top: a running server at a glance, from its /metrics."""

from __future__ import annotations

import argparse
import logging
import time
from collections import deque

import httpx
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from server.api_key import authorization
from server.errors import CosError
from server.scrape import Scrape, parse_metrics
from server.top.view import render

_TIMEOUT = 10.0


class Unreachable(CosError):
    """No metrics came from the address."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `cos-server top`."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (%(default)s)")
    parser.add_argument(
        "--interval", type=_positive, default=1.0, help="seconds between scrapes (%(default)s)"
    )
    parser.add_argument(
        "--window", type=_positive, default=10.0, help="seconds that rates cover (%(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="print one window and exit")


def run(options: argparse.Namespace) -> int:
    """Show until interrupted; a server that goes away may come back."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # its lines would tear the screen
    url = options.url.rstrip("/")
    console = Console()
    with httpx.Client(timeout=_TIMEOUT, headers=authorization()) as http:
        first = fetch(http, url)  # a wrong address ends the command
        if options.once:
            time.sleep(options.window)
            console.print(render(first, fetch(http, url), url))
            return 0
        _watch(http, url, first, options, console)
    return 0


def fetch(http: httpx.Client, url: str) -> Scrape:
    """Raises Unreachable."""
    try:
        response = http.get(f"{url}/metrics")
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreachable(f"no metrics at {url}/metrics: {error}") from error
    scrape = parse_metrics(response.text, time.monotonic())
    if "cos_build_info" not in scrape:
        raise Unreachable(f"what answers at {url}/metrics is no cos-server")
    return scrape


def _watch(
    http: httpx.Client, url: str, first: Scrape, options: argparse.Namespace, console: Console
) -> None:
    num_kept = max(2, round(options.window / options.interval) + 1)
    scrapes = deque([first], maxlen=num_kept)
    # No alternate screen and few refreshes: it stays readable over a slow line.
    with Live(console=console, auto_refresh=False) as live:
        while True:
            time.sleep(options.interval)
            live.update(_frame(http, url, scrapes), refresh=True)


def _frame(http: httpx.Client, url: str, scrapes: deque[Scrape]) -> RenderableType:
    try:
        scrapes.append(fetch(http, url))
    except Unreachable as error:
        return Text(str(error), style="red")
    return render(scrapes[0], scrapes[-1], url)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value

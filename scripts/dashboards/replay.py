"""Every panel and rule against a real Prometheus: python -m scripts.dashboards.replay --help.

Starts a server and Prometheus, the latter with docker/prometheus as it is but for the server's
address, and sends traffic. Prometheus scrapes through a proxy that keeps what passes. At the end
every query of the dashboards and every rule is asked of Prometheus, and worked out again from the
very same scrapes by `promql`: a query has to return data, and both answers have to agree.

Before that promtool checks the configuration and runs the rules' unit tests. Prometheus must be
installed; Debian's package will do.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml
from rich.console import Console
from rich.table import Table

from scripts.dashboards.panels import DASHBOARDS
from scripts.dashboards.promql import Evaluator, Recording, Vector
from scripts.dashboards.traffic import Traffic
from server.scrape import parse_metrics

_ROOT = Path(__file__).parents[2]
_RULES = _ROOT / "docker" / "prometheus"
_CHECKS = (
    ("check", "config", "docker/prometheus/prometheus.yml"),
    ("test", "rules", "tests/dashboards/rules_test.yml"),
)
_TOLERANCE = 1e-6
_VARIABLES = {"$__rate_interval": "1m", "$job": ".*"}


@dataclass(frozen=True, slots=True)
class Query:
    """One query, and where it stands; `may_be_empty` where no data is good news."""

    where: str
    text: str
    may_be_empty: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Both answers to one query."""

    query: Query
    answer: Vector
    expected: Vector

    @property
    def difference(self) -> float:
        """The largest relative one; infinite where one side has a series that the other lacks."""
        if set(self.answer) != set(self.expected):
            return math.inf
        pairs = [(value, self.expected[labels]) for labels, value in self.answer.items()]
        return max((_difference(*pair) for pair in pairs), default=0.0)

    @property
    def status(self) -> str:
        if not self.answer and not self.query.may_be_empty:
            return "no data"
        return "ok" if self.difference <= _TOLERANCE else "differs"


def _difference(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-12)


def queries() -> Iterator[Query]:
    """All of the dashboards and the rules."""
    for dashboard in DASHBOARDS:
        for _, row in dashboard.rows:
            for panel in row:
                for legend, expression in panel.queries:
                    for name, value in _VARIABLES.items():
                        expression = expression.replace(name, value)
                    where = f"{dashboard.title}: {panel.title}: {legend}"
                    yield Query(where, expression, may_be_empty=panel.is_rare)
    for group in yaml.safe_load((_RULES / "rules.yml").read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            name = rule.get("record") or rule["alert"]
            if "record" in rule:
                # engine.shadow is an option.
                may_be_empty = "cos_shadow_" in rule["expr"]
                yield Query(f"rule: {name}", rule["expr"], may_be_empty)
            elif "cos:" not in rule["expr"]:  # the others ask what is recorded
                yield Query(f"alert: {name}", rule["expr"], may_be_empty=True)


class Recorder(ThreadingHTTPServer):
    """Passes scrapes on to the server and keeps what came back, with its moment."""

    daemon_threads = True

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), _RecorderHandler)
        self.url = url
        self.kept: list[tuple[float, str]] = []

    def recording(self, moments: Sequence[float]) -> Recording:
        """`moments`: those that Prometheus gave its scrapes; each belongs to the next answer."""
        scrapes = []
        for moment in moments:
            text = next(text for when, text in self.kept if when >= moment - 0.05)
            scrapes.append((moment, parse_metrics(text, moment)))
        port = self.server_address[1]
        target = {("job", "cos-server"), ("instance", f"127.0.0.1:{port}")}
        return Recording(tuple(scrapes), frozenset(target))


class _RecorderHandler(BaseHTTPRequestHandler):
    server: Recorder

    def do_GET(self) -> None:
        try:
            reply = httpx.get(f"{self.server.url}/metrics", timeout=30)
        except httpx.HTTPError:
            self.send_error(502)
            return
        self.server.kept.append((time.time(), reply.text))
        self.send_response(reply.status_code)
        self.send_header("Content-Type", reply.headers["Content-Type"])
        self.end_headers()
        self.wfile.write(reply.content)

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not worth a line each."""


class Process(AbstractContextManager["Process"]):
    """A child whose output goes to a file."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._arguments = arguments
        self._log = log

    def __enter__(self) -> Process:
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(self._arguments, stdout=log, stderr=log, cwd=_ROOT)
        return self

    def wait_for(self, url: str, seconds: float = 300.0) -> None:
        """Until it answers 200. Raises RuntimeError where it ends or takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._child.poll() is not None:
                break
            try:
                if httpx.get(url, timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"{url} did not answer; see {self._log}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._child.terminate()
        self._child.wait(timeout=60)


class Prometheus:
    """The HTTP API of a running one."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, query: str, moment: float) -> list[dict[str, Any]]:
        parameters = {"query": query, "time": f"{moment:.3f}"}
        reply = httpx.get(f"{self._url}/api/v1/query", params=parameters, timeout=30)
        body = reply.json()
        if body["status"] != "success":
            raise RuntimeError(f"{query}: {body.get('error')}")
        result: list[dict[str, Any]] = body["data"]["result"]
        return result

    def vector(self, query: str, moment: float) -> Vector:
        return {
            frozenset((k, v) for k, v in row["metric"].items() if k != "__name__"): float(
                row["value"][1]
            )
            for row in self.ask(query, moment)
        }

    def scrape_moments(self, moment: float) -> list[float]:
        """Of the scrapes that succeeded, oldest first."""
        rows = self.ask('up{job="cos-server"}[1h]', moment)
        return [when for row in rows for when, value in row["values"] if value == "1"]


def write_configuration(folder: Path, target: str) -> Path:
    """docker/prometheus with the server at `target`."""
    shutil.copytree(_RULES, folder, dirs_exist_ok=True)
    path = folder / "prometheus.yml"
    text = path.read_text(encoding="utf-8")
    if text.count("server:8000") != 1:
        raise RuntimeError("prometheus.yml does not scrape server:8000")
    path.write_text(text.replace("server:8000", target), encoding="utf-8")
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def replay(options: argparse.Namespace, folder: Path) -> list[Verdict]:
    """Run everything, and judge every query."""
    server_port, prometheus_port = free_port(), free_port()
    server_url = f"http://127.0.0.1:{server_port}"
    prometheus_url = f"http://127.0.0.1:{prometheus_port}"
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(server_url))
        threading.Thread(target=recorder.serve_forever, daemon=True).start()
        stack.callback(recorder.shutdown)
        command = [sys.executable, "-m", "server", "serve", "--port", str(server_port)]
        command += ["--config", str(options.config)]
        for override in options.set:
            command += ["--set", override]
        server = stack.enter_context(Process(command, folder / "server.log"))
        target = f"127.0.0.1:{recorder.server_address[1]}"
        configuration = write_configuration(folder / "prometheus", target)
        prometheus = stack.enter_context(
            Process(
                [
                    options.prometheus,
                    f"--config.file={configuration}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{prometheus_port}",
                ],
                folder / "prometheus.log",
            )
        )
        prometheus.wait_for(f"{prometheus_url}/-/ready")
        server.wait_for(f"{server_url}/health")
        with Traffic(server_url):  # begins while models load: some answers are 503
            server.wait_for(f"{server_url}/ready")
            time.sleep(options.seconds)
            return list(judge(Prometheus(prometheus_url), recorder))


def judge(prometheus: Prometheus, recorder: Recorder) -> Iterator[Verdict]:
    """All queries at one moment, under traffic; it is just past, so that its samples are there."""
    moment = math.floor(time.time()) - 1.0
    evaluator = Evaluator(recorder.recording(prometheus.scrape_moments(moment)), moment)
    for query in queries():
        answer = prometheus.vector(query.text, moment)
        yield Verdict(query, answer, evaluator.evaluate(query.text))


def report(verdicts: Sequence[Verdict], console: Console) -> None:
    table = Table("query", "series", "a value", "worst difference", "", box=None)
    for verdict in verdicts:
        value = next((f"{each:.4g}" for each in verdict.answer.values()), "-")
        series = str(len(verdict.answer))
        where, status = verdict.query.where, verdict.status
        table.add_row(where, series, value, f"{verdict.difference:.1e}", status)
    console.print(table)
    good = sum(verdict.status == "ok" for verdict in verdicts)
    console.print(f"{good} of {len(verdicts)} queries agree")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.dashboards.replay")
    add = parser.add_argument
    add("--config", type=Path, default=Path("configs/default.yaml"), help="of the server")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="of that file, instead")
    add("--seconds", type=float, default=100, help="of traffic (%(default)s)")
    add("--prometheus", default="prometheus", help="the program (%(default)s)")
    add("--out", type=Path, help="write all answers as JSON")
    options = parser.parse_args(arguments)
    for check in _CHECKS:
        subprocess.run(["promtool", *check], cwd=_ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder:
        verdicts = replay(options, Path(folder))
    report(verdicts, Console(width=130))
    if options.out:
        rows = [
            {
                "where": verdict.query.where,
                "query": verdict.query.text,
                "status": verdict.status,
                "difference": verdict.difference,
                "answer": [[dict(k), v] for k, v in verdict.answer.items()],
            }
            for verdict in verdicts
        ]
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(verdict.status == "ok" for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())

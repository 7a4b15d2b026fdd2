"""`cos-server top`: from two scrapes to a screen."""

from __future__ import annotations

import io

import httpx
import pytest
from rich.console import Console

from server.__main__ import main
from server.core.combination import Combination
from server.core.stats import Delivery, StepStats
from server.engine.cost_table import CostTable, Timings
from server.metrics import Metrics, ModelFacts
from server.scrape import Scrape, parse_metrics
from server.top.view import render
from tests.support.api import make_config, make_table_app
from tests.support.engines import make_decoding
from tests.support.live_server import run_server

COS = make_decoding("cos", Combination.weighted((0.5, 0.5)), gamma=4)


def make_metrics() -> Metrics:
    metrics = Metrics(make_config())
    metrics.engine.watch_phase(lambda: "ready")
    facts = [
        ModelFacts("cpu", "float32", 1 << 22, 10, 1 << 20),
        ModelFacts("cpu", "float32", 1 << 23, 20, 2 << 20),
    ]
    metrics.engine.watch_models(lambda: (3, 5), lambda: (0, 0), facts)
    return metrics


def step() -> StepStats:
    return StepStats(
        1,
        num_sequences=2,
        num_decoding=2,
        num_tokens=6,
        forward_seconds=0.5,
        step_seconds=1.0,
        num_proposed=2,
        verified_by_offset=[(0, 0, True), (0, 1, True), (0, 2, True), (0, 3, False)],
        tails=[4],
        num_recovered=1,
        deliveries=[Delivery(COS, 20, has_first=True)],
        baseline_seconds=1.5,
    )


def scrape(metrics: Metrics, moment: float) -> Scrape:
    return parse_metrics(metrics.render().decode(), moment)


def screen(before: Scrape, after: Scrape) -> str:
    screen = io.StringIO()
    Console(width=100, file=screen).print(render(before, after, "http://x"))
    return " ".join(screen.getvalue().split())


def test_rates_and_ratios_of_a_window() -> None:
    metrics = make_metrics()
    metrics.speedup.calibrated(CostTable(Timings((1,), ((0.1,), (0.1,)), (0.0,), (0.1,))))
    before = scrape(metrics, 100.0)
    metrics.observe_step(step())
    text = screen(before, scrape(metrics, 102.0))
    assert "table http://x ready weighted auto gamma auto" in text
    assert "tokens/s 10.0 estimated speedup 1.50x" in text
    assert "verified a cycle 4.00" in text
    assert "pending before 4.00" in text
    assert "gamma of new texts 4.00" in text
    assert "m0 0% 0.0 75% 3 of 10 3 of 10 MiB" in text
    assert "m1 25% 1.0 - 5 of 20 10 of 40 MiB" in text


def test_no_traffic_is_no_number() -> None:
    metrics = make_metrics()
    metrics.speedup.calibrated(CostTable(Timings((1,), ((0.1,), (0.1,)), (0.0,), (0.1,))))
    now = scrape(metrics, 1.0)
    text = screen(now, now)
    assert "estimated speedup - " in text
    assert "nan" not in text


def test_no_calibration_is_said() -> None:
    now = scrape(make_metrics(), 1.0)
    assert "speedup not calibrated" in screen(now, now)


def test_counters_that_start_over_do_not_go_below_zero() -> None:
    old, new = make_metrics(), make_metrics()
    for _ in range(3):
        old.observe_step(step())
    new.observe_step(step())
    assert "tokens/s 20.0" in screen(scrape(old, 0.0), scrape(new, 1.0))


def test_a_server_without_an_engine_yet() -> None:
    metrics = Metrics(make_config())
    metrics.engine.watch_phase(lambda: "loading")
    now = scrape(metrics, 0.0)
    assert "not ready" in screen(now, now)


def test_label_values_may_hold_anything() -> None:
    parsed = parse_metrics('# HELP a b\na{x="1, {}\\"",y="2"} 3e0\nb 1\nnonsense\n', 0.0)
    assert parsed.total("a", y="2") == 3
    assert parsed.total("b") == 1


def test_once_against_a_live_server(capsys: pytest.CaptureFixture[str]) -> None:
    with run_server(make_table_app().app) as url:
        assert main(["top", "--url", url, "--once", "--window", "0.05"]) == 0
    assert "ready" in capsys.readouterr().out


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--url", "http://127.0.0.1:9", "--once"]) == 2
    assert "no metrics at http://127.0.0.1:9/metrics" in capsys.readouterr().err


def test_something_else_is_no_cos_server(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = httpx.Response(200, text="up 1\n", request=httpx.Request("GET", "http://x"))
    monkeypatch.setattr(httpx.Client, "get", lambda *_: answer)
    assert main(["top", "--url", "http://x", "--once"]) == 2

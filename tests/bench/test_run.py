"""The whole client against a server that streams made-up tokens."""

from __future__ import annotations

import argparse
import json
from collections import Counter

import pytest

from server.bench.cli import add_arguments, run
from tests.bench.fake_server import FakeServer, serve


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(arguments))


STRATEGIES = ("--strategies", "standard,cos")
SMALL = ("--num-prompts", "4", "--rounds", "2", "--max-tokens", "20", *STRATEGIES)


def test_results_of_a_run(tmp_path, capsys):
    fake, out = FakeServer(step_seconds=0.002), tmp_path / "result.json"
    with serve(fake) as url:
        code = bench("--base-url", url, *SMALL, "--concurrency", "1,2", "--out", str(out))
    assert code == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["server"] == {"base_url": url, "model": "fake"}
    assert result["machine"]["cores"] > 0
    assert len(result["requests"]) == 2 * 2 * 4
    assert all(row["num_tokens"] == 20 and row["error"] is None for row in result["requests"])
    standard, cos = result["summaries"][:2]
    assert (standard["strategy"], standard["ratio"], cos["strategy"]) == ("standard", 1.0, "cos")
    assert cos["decode_ratio"] > 1.2  # it sends two tokens where standard sends one
    assert cos["acceptance"] == [0.5, None]
    assert cos["tokens_per_forward"] == [1.0, 2.0]
    assert standard["estimated_ratio"] == pytest.approx(1)
    assert cos["estimated_ratio"] == pytest.approx(2)
    assert (standard["gamma"], cos["gamma"]) == ([0, 0], [3, 0])
    assert cos["acceptance_by_position"] == {"small": [0.5, 0.5]}
    shown = capsys.readouterr().out
    assert shown.count("in flight") == 2
    assert "× standard" in shown


def test_what_is_asked_of_the_server():
    fake = FakeServer()
    with serve(fake) as url:
        combination = '{"method": "linear", "weights": [1, 1]}'
        code = bench("--base-url", url, *SMALL, "--warmup", "0", "--combination", combination)
    assert code == 0
    assert Counter(body["cos"]["strategy"] for body in fake.requests) == {"standard": 4, "cos": 4}
    asked: dict[str, list[tuple[int, str]]] = {name: [] for name in ("standard", "cos")}
    for body in fake.requests:
        assert body["cos"]["combination"] == {"method": "linear", "weights": [1, 1]}
        assert body["ignore_eos"] is True
        asked[body["cos"]["strategy"]].append((body["seed"], body["prompt"]))
    assert asked["standard"] == asked["cos"]


def test_seeds_may_be_left_out():
    fake = FakeServer()
    with serve(fake) as url:
        assert bench("--base-url", url, *SMALL, "--no-seeds") == 0
    assert not any("seed" in body for body in fake.requests)


def test_further_fields_are_sent():
    fake, form = FakeServer(), {"type": "json_object"}
    with serve(fake) as url:
        body = json.dumps({"response_format": form, "ignore_eos": False})
        assert bench("--base-url", url, *SMALL, "--body", body) == 0
    assert all(body["response_format"] == form for body in fake.requests)
    assert not any(body["ignore_eos"] for body in fake.requests)


def test_no_estimate_from_a_server_without_metrics(tmp_path):
    out = tmp_path / "result.json"
    with serve(FakeServer(has_metrics=False)) as url:
        assert bench("--base-url", url, *SMALL, "--out", str(out)) == 0
    summaries = json.loads(out.read_text(encoding="utf-8"))["summaries"]
    assert [summary["estimated_ratio"] for summary in summaries] == [None, None]


def test_concurrency_is_kept_and_not_exceeded():
    fake = FakeServer(step_seconds=0.002)
    with serve(fake) as url:
        bench("--base-url", url, "--num-prompts", "8", "--rounds", "1", "--concurrency", "3")
    assert fake.max_in_flight == 3


@pytest.mark.parametrize("how", ["status", "event", "cut", "usage"])
def test_failed_requests_are_counted_and_end_in_exit_code_1(how, tmp_path, capsys):
    out = tmp_path / "result.json"
    with serve(FakeServer(fail=("cos", how))) as url:
        code = bench("--base-url", url, *SMALL, "--out", str(out))
    assert code == 1
    standard, cos = json.loads(out.read_text(encoding="utf-8"))["summaries"]
    assert (standard["num_errors"], cos["num_errors"], cos["ratio"]) == (0, 4, None)
    assert "4 requests failed" in capsys.readouterr().err


def test_no_server(capsys):
    assert bench("--base-url", "http://127.0.0.1:9") == 1
    assert "no list of models" in capsys.readouterr().err


def test_wrong_options_end_in_exit_code_2(capsys):
    assert bench("--strategies", "fast") == 2
    assert "unknown strategy" in capsys.readouterr().err


def test_markdown_of_results(tmp_path, capsys):
    out = tmp_path / "result.json"
    with serve(FakeServer()) as url:
        bench("--base-url", url, *SMALL, "--out", str(out))
    capsys.readouterr()
    assert bench("--table", str(out), str(out)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| prompts | concurrency | strategy |")
    assert len(lines) == 2 + 2 * 2
    assert {line.count("|") for line in lines} == {12}


def test_a_file_that_is_no_result(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    assert bench("--table", str(tmp_path / "other.json")) == 2
    assert "no result of this benchmark" in capsys.readouterr().err

"""Two servers that stream made-up tokens, one of them twice as slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.compare_servers import main
from tests.bench.fake_server import FakeServer, serve

SMALL = ("--num-prompts", "4", "--rounds", "2", "--max-tokens", "6", "--concurrency", "1,2")


def test_rates_and_their_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    quick, slow = FakeServer(step_seconds=0.002), FakeServer(step_seconds=0.02)
    with serve(quick) as first, serve(slow) as second:
        servers = ("--server", f"quick={first}", "--server", f"slow={second}")
        assert main([*servers, *SMALL, "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    points = result["points"]
    assert [(p["server"], p["concurrency"]) for p in points] == [
        ("quick", 1),
        ("slow", 1),
        ("quick", 2),
        ("slow", 2),
    ]
    # Three prompts a round for each request in flight, which are more than were asked for.
    assert [[tokens for tokens, _ in point["rounds"]] for point in points] == [
        *[[18, 18]] * 2,
        *[[36, 36]] * 2,
    ]
    assert points[0]["tokens_per_second"] > points[1]["tokens_per_second"]
    assert "ratio of the first" in capsys.readouterr().out


@pytest.mark.parametrize("server", ["nameless", "a=", "=http://127.0.0.1:1"])
def test_malformed_servers_are_named(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--server", server]) == 1
    assert "expected NAME=URL" in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--server", "gone=http://127.0.0.1:9"]) == 1
    assert "no list of models" in capsys.readouterr().err

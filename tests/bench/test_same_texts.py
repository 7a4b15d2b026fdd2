"""Greedy texts of a real engine over tables do not depend on how they are decoded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.same_texts import _agreed, main
from tests.support.api import make_table_app
from tests.support.live_server import run_server


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "digits.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("12", "3", "214")))
    return str(path)


def test_all_are_the_same(prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    with run_server(make_table_app().app) as url:
        small = ("--prompts", prompts, "--max-tokens", "6", "--concurrency", "3")
        assert main(["--server", url, *small]) == 0
    shown = capsys.readouterr().out
    assert shown.count("3 of 3") == 4
    assert shown.count("100.0%") == 4


def test_a_refused_request_is_told(prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    with run_server(make_table_app().app) as url:
        options = ("--prompts", prompts, "--strategies", "cos:gamma=1000")
        assert main(["--server", url, *options]) == 1
    assert "400" in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--server", "http://127.0.0.1:9"]) == 1
    assert "no list of models" in capsys.readouterr().err


@pytest.mark.parametrize(("other", "count"), [([1, 2, 3], 3), ([1, 2, 4], 2), ([0, 2, 3], 0)])
def test_tokens_before_texts_part(other: list[int], count: int) -> None:
    assert _agreed([1, 2, 3], other) == count

"""The grid against a server that streams made-up tokens, and pictures of its results."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from server.bench import grid
from server.bench.grid import Cell, blocks_of, main
from server.bench.prompts import PromptSet
from server.bench.strategy_spec import parse_strategies
from tests.bench.fake_server import FakeServer, serve

SMALL = ("--prompts", "gsm8k", "--max-tokens", "20", "--cell-seconds", "0", "--strategy", "cos")


def test_strategies_alternate_and_prompts_are_new():
    cell = Cell("weighted-t1", PromptSet("some", tuple("abcdefgh")), 2)
    turns = blocks_of(cell, parse_strategies("standard,auto", None), 8)
    blocks = [*next(turns), *next(turns)]
    assert [block.strategy.label for block in blocks[:4]] == [
        "standard",
        "auto",
        "auto",
        "standard",
    ]
    assert [block.round for block in blocks] == [0, 0, 1, 1, 2, 2, 3, 3]
    asked = ["".join(job.prompt for job in block.jobs) for block in blocks]
    assert asked == [part for part in ("abcdef", "ghabcd", "efghab", "cdefgh") for _ in "ab"]
    lengths = [job.max_tokens for block in blocks[::2] for job in block.jobs]
    assert blocks[0].jobs == blocks[1].jobs
    assert set(lengths) == set(range(4, 13))


@pytest.mark.parametrize(
    ("concurrency", "num_jobs"), [(1, 3), (16, 48), (32, 64), (64, 64), (100, 100)]
)
def test_blocks_are_several_waves_long(concurrency, num_jobs):
    cell = Cell("weighted-t1", PromptSet("some", tuple("abcdefgh")), concurrency)
    for block in next(blocks_of(cell, parse_strategies("standard,auto", None), 48)):
        assert len(block.jobs) == num_jobs
        lengths = [job.max_tokens for job in block.jobs]
        assert 24 <= min(lengths) < max(lengths) <= 72


def test_every_cell_is_measured_written_and_left_out_the_next_time(tmp_path, capsys):
    fake, out = FakeServer(step_seconds=0.001), tmp_path / "grid.json"
    with serve(fake) as url:
        common = ("--base-url", url, "--out", str(out), *SMALL)
        assert main([*common, "--concurrency", "1", "--kinds", "weighted-t1"]) == 0
        num_first = len(fake.requests)
        assert main([*common, "--concurrency", "1,3"]) == 0
    document = json.loads(out.read_text(encoding="utf-8"))
    keys = [key for key, _ in grid.cells_of(document)]
    assert len(keys) == len(set(keys)) == 3 * 2
    assert keys[0] == ("weighted-t1", "gsm8k", 1)
    # 2 x 4 warm-up requests, then 4 blocks of 3 or 9 requests.
    assert num_first == 8 + 12
    assert len(fake.requests) == num_first + 3 * 8 + 2 * 12 + 3 * 36
    for _, (standard, cos) in grid.cells_of(document):
        assert (standard.strategy, standard.ratio, cos.strategy) == ("standard", 1.0, "cos")
        assert cos.ratio is not None
        assert cos.gamma == [3, 0]
    asked = Counter(
        (body["cos"]["combination"]["method"], body["temperature"]) for body in fake.requests
    )
    assert set(asked) == {("weighted", 1.0), ("contrastive", 0.0), ("contrastive", 1.0)}
    assert not any("seed" in body for body in fake.requests)
    shown = capsys.readouterr().out
    assert "[6/6] weighted-t1 gsm8k 3" in shown
    table = [line for line in shown.splitlines() if line.startswith("| weighted-t1")]
    assert table[-1].startswith("| weighted-t1 | gsm8k | 3 |")
    assert "| 3.00 / 0.00 | cos 100% |" in table[-1]


def test_results_of_other_settings_are_not_gone_on_with(tmp_path, capsys):
    out = tmp_path / "grid.json"
    with serve(FakeServer()) as url:
        arguments = ["--base-url", url, "--out", str(out), "--concurrency", "1", *SMALL]
        assert main([*arguments, "--kinds", "contrastive-t0"]) == 0
        assert main([*arguments, "--max-tokens", "24"]) == 2
    assert "was measured with" in capsys.readouterr().err


def test_failed_requests_end_in_exit_code_1(tmp_path):
    with serve(FakeServer(fail=("cos", "cut"))) as url:
        arguments = ["--base-url", url, "--out", str(tmp_path / "grid.json"), *SMALL]
        arguments += ["--concurrency", "1", "--kinds", "contrastive-t0"]
        assert main(arguments) == 1
        assert main(arguments) == 1  # what failed is measured again


def test_pictures(tmp_path, capsys):
    from server.bench import plot

    out = tmp_path / "grid.json"
    with serve(FakeServer()) as url:
        arguments = ["--base-url", url, "--out", str(out), "--concurrency", "1,2", *SMALL]
        assert main(arguments) == 0
    assert plot.main([str(out), "--out", str(tmp_path / "docs")]) == 0
    pictures = sorted((tmp_path / "docs").iterdir())
    assert [path.name for path in pictures] == ["acceptance.png", "gamma.png", "speedup.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    (tmp_path / "other.json").write_text("{}")
    assert plot.main([str(tmp_path / "other.json"), "--out", str(tmp_path)]) == 1
    assert "other.json: no result file" in capsys.readouterr().err


def test_the_picture_of_lockstep(tmp_path):
    from server.bench import plot

    results = Path(__file__).parents[2] / "docs" / "results" / "lockstep.json"
    assert plot.main(["--lockstep", str(results), "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["lockstep.png"]

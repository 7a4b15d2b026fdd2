"""The account of a step's parts adds up, on a tiny pair."""

import pytest

from server.bench import overhead
from server.bench.overhead import Stopwatch
from server.bench.prompts import PromptSet
from server.core.sampling_params import SamplingParams
from tests.support.tiny_models import write_pair_config


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Work:
    def __init__(self, clock):
        self.clock = clock

    def outer(self):
        self.clock.now += 1
        self.inner()
        self.clock.now += 2

    def inner(self):
        self.clock.now += 4
        if self.clock.now > 100:
            raise ValueError("too late")


def test_what_runs_inside_a_part_is_charged_to_itself_alone():
    clock = Clock()
    work, watch = Work(clock), Stopwatch(clock)
    watch.wrap(work, "outer", "a")
    watch.wrap(work, "inner", "b")
    clock.now += 8
    work.outer()
    assert watch.seconds == {"a": 3, "b": 4}
    assert watch.share("b") == pytest.approx(4 / 7)
    clock.now = 100
    with pytest.raises(ValueError, match="too late"):
        work.outer()
    clock.now = 0
    work.outer()
    assert watch.seconds == {"a": 7, "b": 12}


def test_a_table_of_a_tiny_pair(tmp_path, capsys, monkeypatch):
    path = write_pair_config(tmp_path)
    prompts = PromptSet("short", ("for number in data", "return value"))
    monkeypatch.setattr(overhead, "load_prompts", lambda name: prompts)
    strategies = "standard,cos:gamma=2,auto"
    overhead.main(
        ["--config", str(path), "--batch", "1", "2", "--strategies", strategies, "--tokens", "12"]
    )
    tables = capsys.readouterr().out.split("shares of CPU time")[1:]
    assert len(tables) == 2
    for table in tables:
        lines = [line.split() for line in table.splitlines()]
        rows = {" ".join(line[:-3]): line[-3:] for line in lines if line[-1:] and "%" in line[-1]}
        rows = {name: cells for name, cells in rows.items() if not name.startswith("batch")}
        shares = {name: [float(cell[:-1]) for cell in cells] for name, cells in rows.items()}
        assert set(shares) == {overhead.FORWARD, overhead.DECIDE, *overhead.OUTSIDE, "outside"}
        for column in range(3):
            inside = shares[overhead.FORWARD][column] + shares[overhead.DECIDE][column]
            assert inside + shares["outside"][column] == pytest.approx(100, abs=0.3)
            assert shares[overhead.FORWARD][column] > shares[overhead.STORE][column]
        # By standard scores decide before their model runs again, and are never stored.
        assert shares[overhead.STORE][1] > 0 == shares[overhead.STORE][0]


def test_more_of_the_request(tmp_path):
    options = overhead._parse(
        ["--config", str(tmp_path), "--temperature", "1", "--sampling", '{"top_p": 0.9}']
    )
    assert overhead._params(options) == SamplingParams(max_tokens=40, temperature=1, top_p=0.9)
    options.sampling = {"top_q": 1}
    with pytest.raises(SystemExit, match="--sampling: .*top_q"):
        overhead._params(options)

"""The micro-benchmark of forwards runs on any configured models."""

import pytest
import torch
import yaml

from server.bench import forward
from tests.support.tiny_models import make_pair


@pytest.fixture
def threads():
    """The benchmark sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


NAMES = ("amateur", "expert")


@pytest.fixture
def config(tmp_path):
    models = [
        {"name": name, "path": str(path)}
        for name, path in zip(NAMES, make_pair(tmp_path), strict=True)
    ]
    config = {
        "served_model_name": "tiny",
        "models": models,
        "combination": {"method": "contrastive", "mu": 0.1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_one_table_for_each_model(config, capsys, threads):
    arguments = ["--past", "40", "--shared", "32", "--rounds", "3", "--threads", str(threads)]
    forward.main(["--config", config, *arguments])
    output = capsys.readouterr().out
    assert "past 40 tokens, 32 of them shared" in output
    assert all(output.count(name) == 1 for name in NAMES)
    rows = [line.split() for line in output.splitlines() if line.strip()[:1].isdigit()]
    shapes = [(int(row[0]), int(row[1])) for row in rows]
    assert shapes == [*forward.SHAPES, *forward.SHAPES]
    assert all(float(cell) > 0 for row in rows for cell in row)


def test_goals_stand_beside_the_times_of_the_last_model(config, capsys, threads):
    common = ["--config", config, "--past", "9", "--rounds", "3", "--threads", str(threads)]
    forward.main([*common, "--goals"])
    tables = capsys.readouterr().out.split("expert")
    assert "<=" not in tables[0]
    num_goals = sum(goal is not None for goals in forward.GOALS.values() for goal in goals)
    assert tables[1].count("<=") == num_goals
    assert "<= 21" in tables[1]


def test_a_goal_that_is_missed():
    assert forward._beside(21.04, 21) == "21.0 > 21"
    assert forward._beside(20.9, 21) == "20.9 <= 21"

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


def test_one_table_for_each_model(tmp_path, capsys, threads):
    names = ("amateur", "expert")
    models = [
        {"name": name, "path": str(path)}
        for name, path in zip(names, make_pair(tmp_path), strict=True)
    ]
    config = {
        "served_model_name": "tiny",
        "models": models,
        "combination": {"method": "contrastive", "mu": 0.1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    forward.main(["--config", str(path), "--past", "9", "--rounds", "3", "--threads", str(threads)])
    output = capsys.readouterr().out
    assert "past 9 tokens" in output
    assert all(output.count(name) == 1 for name in names)
    rows = [line.split() for line in output.splitlines() if line.strip()[:1].isdigit()]
    shapes = [(int(row[0]), int(row[1])) for row in rows]
    assert shapes == [*forward.SHAPES, *forward.SHAPES]
    assert all(float(cell) > 0 for row in rows for cell in row)

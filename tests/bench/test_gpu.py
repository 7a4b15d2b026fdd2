"""The GPU benchmark runs from end to end, on small shapes and whatever device is there."""

import importlib.util
import json
from functools import partial

import pytest
import torch

from server.bench import gpu, gpu_kernels
from server.bench.gpu_forward import WAYS, time_forwards
from server.bench.gpu_report import expected_tokens
from server.runner import compiled
from server.runner.graph_runner import GraphRunner
from tests.support.tiny_models import write_pair_config

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Of a run over a tiny pair; what it writes goes to the directory beside."""
    directory = tmp_path_factory.mktemp("gpu")
    path = write_pair_config(directory)
    return ["--tiny", "--out", str(directory / "out.json"), "--config", str(path)], directory


def test_every_part_is_measured(arguments, monkeypatch, capsys):
    options, directory = arguments
    # Prompts of real tasks are longer than the tiny models' context.
    monkeypatch.setattr(
        "server.bench.gpu_engine.load_prompts",
        lambda _: type("Prompts", (), {"prompts": ("for number in data", "return value")}),
    )
    monkeypatch.setattr(gpu, "PAIR_MAX_LENGTH", 64)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # no C++ compiler is needed
    plot = ["--plot", str(directory)]
    gpu.main([*options, "--models", str(directory), *plot])
    results = json.loads((directory / "out.json").read_text())
    assert results["left_out"] == []
    forwards, compiled_layers = (
        [f"{part} {name}" for name in gpu.TINY.members] for part in ("forward", "compiled")
    )
    measured = ["cycle", "engine cycle", "pair"]
    assert [*results["part_seconds"]] == [*forwards, *measured, *compiled_layers]
    for name in gpu.TINY.members:
        rows = results[f"forward {name}"]
        assert len(rows) == 6
        assert all(tuple(row["seconds"]) == WAYS for row in rows)
        assert all(seconds > 0 for row in rows for seconds in row["seconds"].values())
        assert all(row["floor_seconds"] > 0 for row in rows)
    assert [row["batch"] for row in results["cycle"]] == [1, 2]
    for row in results["engine cycle"]:
        # Unrelated models: a cycle makes a token of each sequence, or a few.
        assert row["standard"]["sequences"] == row["batch"]
        assert row["cos"]["cycles"] <= row["standard"]["cycles"] == gpu.TINY.engine_tokens
    assert [(row["batch"], row["temperature"]) for row in results["pair"]] == [
        (batch, temperature) for temperature in (0.0, 1.0) for batch in (1, 2)
    ]
    assert all(row["cos"]["tokens_per_second"] > 0 for row in results["pair"])
    names = {"forward-tiny-proposer", "forward-tiny-expert", "cycle", "pair"}
    pictures = {path.name for path in directory.glob("*.png")}
    assert pictures == {f"gpu-{name}.png" for name in names}
    output = capsys.readouterr().out
    assert "The configured pair, contrastive" in output
    assert "floor / best" in output


def raise_error(*_, **__):
    raise RuntimeError("no such kernel")


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("fault", [None, "differs", "raises"])
def test_nothing_is_measured_with_wrong_kernels(arguments, monkeypatch, fault):
    from server.runner import triton_attention

    options, directory = arguments
    if fault == "differs":
        monkeypatch.setitem(gpu_kernels.TOLERANCE, torch.float32, -1.0)
    if fault == "raises":
        monkeypatch.setattr(triton_attention, "attend_group", raise_error)
    has_time = iter([True])  # for the first part only
    monkeypatch.setattr(gpu.Session, "may_go_on", lambda _: next(has_time, False))
    with pytest.raises(SystemExit, match="1"):
        gpu.main([*options, "--attention", "triton", "--models", "nowhere"])
    results = json.loads((directory / "out.json").read_text())
    [row] = results["kernels"]
    assert row["passed"] is (fault is None)
    assert ("error" in row) is (fault == "raises")
    assert ("kernels: 1 of 1 cases failed" in results["left_out"]) is (fault is not None)
    assert results["attention of forwards"] == ("torch" if fault else "kernels")


@pytest.mark.parametrize("fails", [False, True])
def test_eager_forwards_are_not_timed_as_graphs(arguments, monkeypatch, fails):
    """Where nothing can be captured, or an error ends it, what was measured before is kept."""
    options, directory = arguments
    monkeypatch.setattr(gpu, "time_forwards", partial(capturing, time_forwards))
    if fails:
        monkeypatch.setattr(GraphRunner, "forward", raise_error)
        monkeypatch.setattr(GraphRunner, "num_graphs", 1)
    has_time = iter([True, True, True])
    monkeypatch.setattr(gpu.Session, "may_go_on", lambda _: next(has_time, False))
    with pytest.raises(SystemExit, match="1"):
        gpu.main([*options, "--models", "nowhere"])
    results = json.loads((directory / "out.json").read_text())
    assert "graphs of tiny-expert: see the log; cycles are eager" in results["left_out"]
    for row in results["forward tiny-expert"]:
        assert [*row["seconds"]] == ["transformers", "written out"]
    assert results["cycle"]
    assert ("fail: no such kernel" in " ".join(results["log"])) is fails


def capturing(time_forwards, rows, member, load, capture, report):
    """As on a GPU, where there is none."""
    return time_forwards(rows, member, load, True, report)


def test_out_of_time_is_said(arguments):
    options, directory = arguments
    with pytest.raises(SystemExit, match="1"):
        gpu.main(
            [*options, "--seconds", "0", "--models", str(directory), "--attention", "portable"]
        )
    results = json.loads((directory / "out.json").read_text())
    assert f"forward {gpu.TINY.members[0]}: no time left" in results["left_out"]


def test_the_cpu_runs_small_shapes_only(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert "only --tiny runs on the CPU" in capsys.readouterr().err


def test_expected_tokens():
    assert expected_tokens(0.0, 4) == 1
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.8, 4) == pytest.approx(3.3616)

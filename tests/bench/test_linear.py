from __future__ import annotations

import pytest
import torch

from server.bench import linear


def test_all_layouts_compute_the_same() -> None:
    weight, x = torch.randn(8, 16).half().float(), torch.randn(3, 16)
    for name, product in linear.layouts(weight).items():
        tolerance = 0.1 if "bfloat16" in name else 1e-4
        assert torch.allclose(product(x), x @ weight.T, atol=tolerance), name


def test_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(linear, "SHAPES", {"small": (8, 16)})
    monkeypatch.setattr(linear, "_BYTES", 1024)
    linear.main(["--rows", "1,2", "--rounds", "1"])
    shown = capsys.readouterr().out
    assert "small (8, 16)" in shown
    assert "packed" in shown

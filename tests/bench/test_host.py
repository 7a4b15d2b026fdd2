"""The host's work is measured of an engine that runs ahead, drafts and verifies."""

from typing import Any

import pytest

from server.bench import host
from server.bench.gpu_engine import make_decoding
from server.core.stats import StepStats
from server.engine.observer import Observer


@pytest.mark.parametrize("observed", [[], ["--observed"]])
def test_one_row_for_each_batch(observed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    host.main(["--batch", "1", "3", "--tokens", "8", "--rounds", "1", *observed])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    measured = {
        row[0]: [float(cell) for cell in row[1:]] for row in rows if row[:1] in (["1"], ["3"])
    }
    assert set(measured) == {"1", "3"}
    for step, cycle, _, gap in measured.values():
        assert 0 < step < cycle
        assert 0 < gap < cycle


def test_some_proposals_are_accepted_and_some_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or cycles would not be those of any pair."""
    steps: list[StepStats] = []
    observe = Observer.add

    def note(self: Observer, step: Any, started: float, ends: bool) -> None:
        steps.append(step.outcome.stats)
        observe(self, step, started, ends)

    monkeypatch.setattr(Observer, "add", note)
    host.time_steps(4, make_decoding("cos", 4), 0.0, 40)
    verdicts = [accepted for step in steps for _, _, accepted in step.verified_by_offset]
    assert 0.5 < sum(verdicts) / len(verdicts) < 0.95
    assert {step.model for step in steps} == {0, 1}

"""What a step's seconds are made of, also where a device runs behind the host."""

import pytest

from server.core.combination import Combination
from server.core.stats import StepStats
from tests.engine.test_shadow import EXPERT, PROPOSER, texts, timed_engine
from tests.support.engines import make_decoding, run


def steps_of_a_text() -> list[StepStats]:
    steps: list[StepStats] = []
    engine = timed_engine(steps, every_seconds=None)
    decoding = make_decoding("cos", Combination.weighted([0.3, 0.7]), 3)
    run(engine, texts(decoding, 1, max_tokens=8))
    return steps


def test_a_forward_is_charged_what_it_takes():
    for step in steps_of_a_text():
        assert step.forward_seconds == step.step_seconds
        assert step.forward_seconds >= (PROPOSER, EXPERT)[step.model]
        assert step.combine_seconds == 0


def test_what_a_device_says_of_a_forward_counts(monkeypatch: pytest.MonkeyPatch):
    """Nobody asks before the step has decided everything."""
    calls: list[str] = []

    class Watch:
        def start(self) -> None:
            calls.append("start")

        def stop(self) -> None:
            calls.append("stop")

        def seconds(self) -> float:
            calls.append("seconds")
            return 0.0625

    monkeypatch.setattr("server.engine.advance.make_stopwatch", lambda device, clock: Watch())
    steps = steps_of_a_text()
    assert calls == ["start", "stop", "seconds"] * len(steps)
    for step in steps:
        assert step.forward_seconds == 0.0625
        assert step.combine_seconds == step.step_seconds - 0.0625

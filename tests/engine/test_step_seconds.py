"""What a step's seconds are made of, also where a device runs behind the host."""

import pytest
import torch

from server.core.combination import Combination
from server.core.stats import StepStats
from server.engine.laps import Laps, Timer
from tests.engine.test_shadow import EXPERT, PROPOSER, texts, timed_engine
from tests.runner.test_clock import Device, Event
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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    gpu = Device()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu)
    return gpu


class Host:
    """Its clock, and steps that it hands to a GPU."""

    def __init__(self, gpu: Device) -> None:
        self.now = 0.0
        self.gpu = gpu
        self.timer = Timer(torch.device("cuda"), [torch.device("cuda")], lambda: self.now)

    def enqueue(self, forward: float, rest: float) -> tuple[Laps, StepStats]:
        """A step that takes the device so long; planning and enqueuing take an eighth each."""
        started = self.now
        self.now += 0.125
        laps = self.timer.begin()
        laps.started = started
        self.timer.mark_forward(0, laps)
        self.gpu.queue.append(forward)
        self.timer.mark_forward(0, laps)
        self.gpu.queue.append(rest)
        self.now += 0.125
        self.timer.decide(laps)
        return laps, StepStats(0)


def test_steps_that_were_enqueued_share_what_all_of_them_took(gpu: Device) -> None:
    """By what the device says of each; what it says nothing of belongs to the last."""
    host = Host(gpu)
    run = [host.enqueue(forward, rest) for forward, rest in ((2.0, 0.5), (3.0, 0.25), (4.0, 1.0))]
    assert gpu.now == 0.0
    host.timer.wait()
    assert gpu.now == 10.75
    host.now = run[-1][0].decided = 11.0  # it began late, and the host has waited
    host.now += 0.5  # for the text
    host.timer.close(run)
    assert [stats.step_seconds for _, stats in run] == [2.5, 3.25, 11.5 - 5.75]
    assert [stats.forward_seconds for _, stats in run] == [2.0, 3.0, 4.0]
    assert [stats.combine_seconds for _, stats in run] == [0.5, 0.25, 11.0 - 5.75 - 4.0]


def test_a_step_alone_is_charged_what_the_host_saw(gpu: Device) -> None:
    host = Host(gpu)
    laps, stats = host.enqueue(2.0, 0.5)
    host.timer.wait()
    host.now = laps.decided = 3.0
    host.now += 0.25
    host.timer.close([(laps, stats)])
    assert stats.step_seconds == 3.25
    assert stats.forward_seconds == 2.0
    assert stats.combine_seconds == 3.0 - 0.125 - 2.0

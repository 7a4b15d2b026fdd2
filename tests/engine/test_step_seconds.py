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
        self.timer.start_forward(0, laps)
        self.gpu.queue.append(forward)
        self.timer.stop_forward(0, laps)
        self.gpu.queue.append(rest)
        self.now += 0.125
        self.timer.mark_decided(laps)
        return laps, StepStats(0)


def test_steps_that_were_enqueued_share_what_all_of_them_took(gpu: Device) -> None:
    """By what the device says of each; what it says nothing of belongs to the last."""
    host = Host(gpu)
    run = [host.enqueue(forward, rest) for forward, rest in ((2.0, 0.5), (3.0, 0.25), (4.0, 1.0))]
    assert gpu.now == 0.0
    # The device began late; the host reads what the last step has decided, then writes text.
    host.now = run[-1][0].decided = 11.0
    host.now += 0.5
    host.timer.close(run)
    assert gpu.now == 9.75  # nobody waits for what came after the last forward
    assert [stats.step_seconds for _, stats in run] == [2.5, 3.25, 11.5 - 5.75]
    assert [stats.forward_seconds for _, stats in run] == [2.0, 3.0, 4.0]
    assert [stats.combine_seconds for _, stats in run] == [0.5, 0.25, 11.0 - 5.75 - 4.0 - 0.125]


def test_deferred_scores_are_part_of_the_forward(gpu: Device) -> None:
    """They are computed when they are needed, which no mark is around."""
    host = Host(gpu)
    laps, stats = host.enqueue(2.0, 1.0)
    laps.head_seconds = 0.5
    host.now = laps.decided = 4.0
    host.timer.close([(laps, stats)])
    assert stats.forward_seconds == 2.5
    assert stats.step_seconds == 4.0
    assert stats.combine_seconds == 4.0 - 2.5 - 0.125


def test_a_step_alone_is_charged_what_the_host_saw(gpu: Device) -> None:
    host = Host(gpu)
    laps, stats = host.enqueue(2.0, 0.5)
    host.now = laps.decided = 3.0
    host.now += 0.25
    host.timer.close([(laps, stats)])
    assert stats.step_seconds == 3.25
    assert stats.forward_seconds == 2.0
    assert stats.combine_seconds == 3.0 - 0.125 - 2.0


def test_no_step_takes_less_than_its_forward(gpu: Device) -> None:
    """Clocks of host and device differ by a little, and nobody may count a negative rest."""
    host = Host(gpu)
    run = [host.enqueue(2.0, 0.5), host.enqueue(4.0, 0.0)]
    host.now = run[-1][0].decided = 6.25
    host.timer.close(run)
    assert [stats.step_seconds for _, stats in run] == [2.5, 4.0]
    assert [stats.combine_seconds for _, stats in run] == [0.5, 0.0]


def test_a_model_elsewhere_waits_for_decisions_and_they_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not before they are asked for: other steps may be decided meanwhile."""
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    streams = {device: Device() for device in devices}
    followed: list[tuple[Device, object]] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    monkeypatch.setattr(
        Device, "wait_event", lambda self, event: followed.append((self, event)), raising=False
    )
    timer = Timer(devices[1], devices, lambda: 0.0)
    for model in (0, 1):
        laps = timer.begin()
        timer.start_forward(model, laps)
        timer.stop_forward(model, laps)
        is_elsewhere = model == 0
        assert followed == [(streams[devices[0]], laps.begun)] * is_elsewhere
        followed.clear()
        timer.join(model, laps)
        assert followed == [(streams[devices[1]], laps.forward[1])] * is_elsewhere
        followed.clear()


def test_steps_that_overlap_share_the_time_since_the_last_ones_by_their_forwards(
    gpu: Device,
) -> None:
    host = Host(gpu)
    first = host.enqueue(3.0, 0.0)
    host.now = first[0].decided = 4.0
    host.timer.close([first])
    earlier, later = host.enqueue(2.0, 0.0), host.enqueue(6.0, 0.0)
    earlier[0].started = 1.0  # it was enqueued before the first was known to be done
    later[1].overlaps = True
    host.now = 10.0
    host.timer.close([later, earlier])
    assert [stats.step_seconds for _, stats in (earlier, later)] == [1.5, 4.5]
    assert [stats.forward_seconds for _, stats in (earlier, later)] == [2.0, 6.0]
    assert [stats.combine_seconds for _, stats in (earlier, later)] == [0.0, 0.0]
    assert earlier[1].overlaps, "of its seconds nothing is to be learnt"
    # Nobody is charged for what was idle before the first of them.
    after, beside = host.enqueue(1.0, 0.0), host.enqueue(1.0, 0.0)
    after[0].started, beside[0].started = 20.0, 21.0
    after[1].overlaps = beside[1].overlaps = True
    host.now = 24.0
    host.timer.close([after, beside])
    assert [stats.step_seconds for _, stats in (after, beside)] == [2.0, 2.0]


def test_what_was_charged_before_is_not_charged_again(gpu: Device) -> None:
    """A step may be planned before the one in flight beside it has landed."""
    host = Host(gpu)
    first = host.enqueue(3.0, 0.0)
    host.now = first[0].decided = 4.0
    host.timer.close([first])
    beside = host.enqueue(1.0, 0.0)
    beside[0].started, beside[0].fed = 1.0, 1.125
    host.now = beside[0].decided = 6.0
    host.timer.close([beside])
    assert [stats.step_seconds for _, stats in (first, beside)] == [4.0, 2.0]
    assert beside[1].combine_seconds == 1.0

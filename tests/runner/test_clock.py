import time

import pytest
import torch

from server.runner.clock import make_timeline


def test_marks_on_the_cpu_read_the_clock():
    times = iter([3.0, 5.5])
    timeline = make_timeline(torch.device("cpu"), lambda: next(times))
    start, stop = timeline.mark(), timeline.mark()
    assert timeline.seconds(start, stop) == 2.5
    assert timeline.seconds(start, stop) == 2.5


class Device:
    """A GPU that works off what is enqueued only while somebody waits for it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queue: list[Event | float] = []

    def run_until(self, event: "Event") -> None:
        while event.time is None:
            done = self.queue.pop(0)
            if isinstance(done, Event):
                done.time = self.now
            else:
                self.now += done


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.time: float | None = None
        self.device = Device()

    def record(self, stream: Device) -> None:
        self.time, self.device = None, stream
        stream.queue.append(self)

    def synchronize(self) -> None:
        self.device.run_until(self)

    def elapsed_time(self, end: "Event") -> float:
        assert self.time is not None
        assert end.time is not None
        return 1000 * (end.time - self.time)


def test_marks_on_a_gpu_wait_only_when_they_are_read(monkeypatch: pytest.MonkeyPatch):
    gpus = {torch.device("cuda", 0): Device(), torch.device("cuda", 1): Device()}
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", gpus.__getitem__)
    gpu = gpus[torch.device("cuda", 1)]
    timeline = make_timeline(torch.device("cuda", 1), time.perf_counter)
    gpu.queue.append(8.0)  # of before
    marks = []
    for seconds in (0.25, 0.5):
        marks.append(timeline.mark())
        gpu.queue.append(seconds)
    marks.append(timeline.mark())
    gpu.queue.append(16.0)  # enqueued while the device is still at the rest
    assert len(gpu.queue) == 7
    assert timeline.seconds(marks[0], marks[2]) == 0.75
    assert gpu.queue == [16.0]
    assert timeline.seconds(marks[0], marks[1]) == 0.25
    assert not gpus[torch.device("cuda", 0)].queue

import time

import pytest
import torch

from server.runner.clock import device_clock, make_stopwatch


def test_models_on_the_cpu_need_no_waiting():
    assert device_clock([torch.device("cpu"), torch.device("cpu")]) is time.perf_counter


def test_waits_for_each_gpu_once(monkeypatch: pytest.MonkeyPatch):
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    devices = [torch.device("cuda", 1), torch.device("cpu"), torch.device("cuda", 0)]
    clock = device_clock([*devices, torch.device("cuda", 1)])
    before = time.perf_counter()
    assert clock() >= before
    assert waited == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_a_stopwatch_of_the_cpu_reads_the_clock():
    times = iter([3.0, 5.5])
    watch = make_stopwatch(torch.device("cpu"), lambda: next(times))
    watch.start()
    watch.stop()
    assert watch.seconds() == 2.5
    assert watch.seconds() == 2.5


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


def test_a_stopwatch_of_a_gpu_waits_only_when_it_is_read(monkeypatch: pytest.MonkeyPatch):
    gpus = {torch.device("cuda", 0): Device(), torch.device("cuda", 1): Device()}
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", gpus.__getitem__)
    gpu = gpus[torch.device("cuda", 1)]
    watch = make_stopwatch(torch.device("cuda", 1), time.perf_counter)
    for seconds in (0.25, 0.5):
        gpu.queue.append(8.0)  # of before
        watch.start()
        gpu.queue.append(seconds)
        watch.stop()
        gpu.queue.append(16.0)  # enqueued while the device is still at the rest
        assert watch.seconds() == seconds
        assert gpu.queue == [16.0]
    assert not gpus[torch.device("cuda", 0)].queue

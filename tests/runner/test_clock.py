import time

import pytest
import torch

from server.runner.clock import device_clock


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

"""What the host knows gets to a device as it is, and the host goes on."""

import pytest
import torch
from torch import Tensor

from server.cache.on_device import sent, tensor_on

CPU = torch.device("cpu")


def test_numbers_become_tensors():
    assert torch.equal(tensor_on(CPU, [1, 2]), torch.tensor([1, 2]))
    assert torch.equal(tensor_on(CPU, [[0.5], [2.0]]), torch.tensor([[0.5], [2.0]]))
    assert tensor_on(CPU, [], torch.int64).dtype == torch.int64
    tensor = torch.tensor([3])
    assert sent(tensor, CPU) is tensor


def test_a_gpu_is_sent_pinned_memory_without_waiting(monkeypatch: pytest.MonkeyPatch):
    calls: list[object] = []

    def pin(tensor: Tensor) -> Tensor:
        calls.append("pinned")
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *args, **named: calls.append((args, named)))
    gpu = torch.device("cuda", 1)
    tensor_on(gpu, [1, 2])
    assert calls == ["pinned", ((gpu,), {"non_blocking": True})]

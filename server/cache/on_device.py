"""Numbers that the host knows, as tensors on a device and without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Numbers = Sequence[float] | Sequence[Sequence[float]]


def reading_waits(device: torch.device) -> bool:
    """Does reading from `device` wait for what it was asked before?"""
    return device.type == "cuda"


def tensor_on(device: torch.device, values: Numbers, dtype: torch.dtype | None = None) -> Tensor:
    """torch.tensor(values, dtype=dtype) on `device`."""
    return sent(torch.tensor(values, dtype=dtype), device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which is on the CPU, on `device`.

    A plain copy to a GPU returns when it is done, so after everything that the GPU was given
    before, a forward perhaps. From pinned memory it is only enqueued; torch keeps that memory
    until the GPU has read it.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

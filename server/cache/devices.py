"""Where scores are kept, and where those of all models meet."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def meeting_device(devices: Sequence[torch.device]) -> torch.device:
    """Where scores of models on these `devices` [num_models] meet, and tokens are decided.

    The first GPU: the first model proposes most, and what it proposes is drawn where it runs.
    """
    return next((device for device in devices if device.type == "cuda"), devices[0])


def score_devices(devices: Sequence[torch.device]) -> list[torch.device]:
    """[num_models] where the scores of each are kept: where they meet, or with a model on a CPU."""
    meeting = meeting_device(devices)
    return [meeting if device.type == "cuda" else device for device in devices]


def device_numbers(devices: Sequence[torch.device]) -> tuple[int, ...]:
    """[num_models] `devices` as numbers, 0 for the one where scores meet.

    And for CPUs: the host works on nothing else meanwhile.
    """
    numbers = {meeting_device(devices): 0}
    for device in devices:
        if device.type == "cuda":
            numbers.setdefault(device, len(numbers))
    return tuple(numbers.get(device, 0) for device in devices)

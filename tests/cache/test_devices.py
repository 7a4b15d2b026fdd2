"""Which GPU decides, and which models are elsewhere."""

from __future__ import annotations

import pytest
import torch

from server.cache.devices import device_numbers, meeting_device, score_devices


@pytest.mark.parametrize(
    ("names", "meeting", "scores", "places"),
    [
        (["cpu", "cpu"], "cpu", ["cpu", "cpu"], (0, 0)),
        (["cuda:1", "cuda:0"], "cuda:1", ["cuda:1", "cuda:1"], (0, 1)),
        (["cuda:0", "cuda:0", "cuda:1"], "cuda:0", ["cuda:0"] * 3, (0, 0, 1)),
        # A CPU keeps its scores, and counts for none: the host works on nothing else meanwhile.
        (["cpu", "cuda:0"], "cuda:0", ["cpu", "cuda:0"], (0, 0)),
    ],
)
def test_scores_meet_on_the_first_gpu(
    names: list[str], meeting: str, scores: list[str], places: tuple[int, ...]
) -> None:
    devices = [torch.device(name) for name in names]
    assert meeting_device(devices) == torch.device(meeting)
    assert score_devices(devices) == [torch.device(name) for name in scores]
    assert device_numbers(devices) == places

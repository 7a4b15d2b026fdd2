"""Seconds of steps, those included that the host enqueues without waiting for their end.

The host's clock says when a run of steps began and when the last of them was known to be done;
marks between what the devices were asked share that time out among the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Row
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from server.core.stats import StepStats
from server.runner.clock import Mark, make_timeline


@dataclass(slots=True)
class Laps:
    """Of one step.

    Attributes:
        started, fed, decided: readings of the host's clock in seconds: before planning, before the
            forward, and when everything the step decides was decided or enqueued.
        begun: mark before the forward, on the device where scores meet.
        forward: marks around the forward, on its model's device.
        head_seconds: of deferred scores, which belong to no other forward.
    """

    started: float
    fed: float
    begun: Mark
    decided: float = 0.0
    forward: list[Mark] = field(default_factory=list)
    head_seconds: float = 0.0


class Timer:
    """Takes laps, and makes seconds of them."""

    def __init__(
        self, meeting: torch.device, devices: Row[torch.device], clock: Callable[[], float]
    ) -> None:
        """`devices` [num_models] are the models'; scores meet on `meeting`."""
        self._meeting = make_timeline(meeting, clock)
        self._models = [make_timeline(device, clock) for device in devices]
        self._clock = clock

    def begin(self) -> Laps:
        """Before a forward; nothing of the step was planned before that should be counted."""
        now = self._clock()
        return Laps(started=now, fed=now, begun=self._meeting.mark())

    def mark_forward(self, model: int, laps: Laps) -> None:
        """Before and after the forward of `model`."""
        laps.forward.append(self._models[model].mark())

    def decide(self, laps: Laps) -> None:
        """All of the step is decided or enqueued."""
        laps.decided = self._clock()

    def wait(self) -> None:
        """Until the device where scores meet has done all it was asked."""
        now = self._meeting.mark()
        self._meeting.seconds(now, now)

    def close(self, run: Row[tuple[Laps, StepStats]]) -> None:
        """Fill in the seconds of steps in a row, which now are known to be done."""
        ended = self._clock()
        first, last = run[0][0], run[-1][0]
        left = ended - first.started
        for (laps, stats), (following, _) in pairwise(run):
            stats.step_seconds = self._meeting.seconds(laps.begun, following.begun)
            left -= stats.step_seconds
            self._divide(laps, stats, outside=0.0)
        run[-1][1].step_seconds = left
        # What the host does beside a device that is busy with earlier steps takes no time.
        planning = last.fed - last.started if len(run) == 1 else 0.0
        self._divide(last, run[-1][1], outside=planning + ended - last.decided)

    def _divide(self, laps: Laps, stats: StepStats, outside: float) -> None:
        """A step's seconds into forward and decisions; `outside` belongs to neither."""
        start, stop = laps.forward
        forward = self._models[stats.model].seconds(start, stop) + laps.head_seconds
        stats.forward_seconds = forward
        stats.combine_seconds = max(0.0, stats.step_seconds - forward - outside)

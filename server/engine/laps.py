"""Seconds of steps, those included that the host enqueues without waiting for their end.

The host's clock says when a run of steps began and when the last of them was known to be done;
marks between what the devices were asked share that time out among the steps.
"""

from __future__ import annotations

import math
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
            tensors of the forward are made, and when all the step decides was decided or enqueued.
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
        self._is_elsewhere = [device != meeting for device in devices]
        self._clock = clock
        self._closed = -math.inf  # when the last run was

    def begin(self) -> Laps:
        """Before a step's tensors are made; `started` is for who has planned it to set."""
        now = self._clock()
        return Laps(started=now, fed=now, begun=self._meeting.mark())

    def start_forward(self, model: int, laps: Laps) -> None:
        """Before the forward of `model`, which comes after what was decided so far."""
        if self._is_elsewhere[model]:
            self._models[model].follow(laps.begun)
        laps.forward.append(self._models[model].mark())

    def stop_forward(self, model: int, laps: Laps) -> None:
        """After it."""
        laps.forward.append(self._models[model].mark())

    def join(self, model: int, laps: Laps) -> None:
        """Let what is decided from now on come after the forward of `model`."""
        if self._is_elsewhere[model]:
            self._meeting.follow(laps.forward[1])

    def mark_decided(self, laps: Laps) -> None:
        """All of the step is decided or enqueued."""
        laps.decided = self._clock()

    def close(self, run: Row[tuple[Laps, StepStats]]) -> None:
        """Fill in the seconds of steps in a row; waits until their forwards are done."""
        asked = self._clock()
        for laps, stats in run:
            start, stop = laps.forward
            forward = self._models[stats.model].seconds(start, stop)
            stats.forward_seconds = forward + laps.head_seconds
        if any(stats.overlaps for _, stats in run):
            self._share(run)
        else:
            self._split(run, asked)
        self._closed = self._clock()

    def _share(self, run: Row[tuple[Laps, StepStats]]) -> None:
        """Steps that overlap, with each other or with those of the run before, by forwards."""
        began = max(self._closed, min(laps.started for laps, _ in run))
        seconds = self._clock() - began
        total = sum(stats.forward_seconds for _, stats in run)
        for _, stats in run:
            share = stats.forward_seconds / total if total > 0 else 1 / len(run)
            stats.step_seconds = seconds * share
            stats.overlaps = True
            stats.combine_seconds = max(0.0, stats.step_seconds - stats.forward_seconds)

    def _split(self, run: Row[tuple[Laps, StepStats]], asked: float) -> None:
        """Steps one after the other; the host `asked` for the seconds of forwards then."""
        for (laps, stats), (following, _) in pairwise(run):
            seconds = self._meeting.seconds(laps.begun, following.begun)
            stats.step_seconds = max(seconds, stats.forward_seconds)
            stats.combine_seconds = stats.step_seconds - stats.forward_seconds
        (first, _), (last, stats) = run[0], run[-1]
        # It may have been planned before the last run was closed, beside one that overlaps.
        started = max(self._closed, first.started)
        left = self._clock() - started - sum(stats.step_seconds for _, stats in run[:-1])
        stats.step_seconds = max(left, stats.forward_seconds)
        # What the host plans beside a device that is busy with earlier steps takes no time; what it
        # planned before the first of them is in the time that is left.
        outside = max(0.0, first.fed - started) + asked - last.decided
        rest = stats.step_seconds - stats.forward_seconds - outside
        stats.combine_seconds = max(0.0, rest)

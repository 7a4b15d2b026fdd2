"""What an engine learns from its steps: what they took, and what became of proposals.

A step is observed once the host knows what it took. Where steps are enqueued ahead that is several
steps later, and the next forward is on its way by then: no device waits for what is learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Row
from dataclasses import dataclass

from server.core.sequence import Sequence
from server.core.stats import Delivery, StepStats
from server.decoding.strategies import Strategies
from server.engine.advance import Advancer
from server.engine.controller import Controller
from server.engine.cost_table import CostTable
from server.engine.outcome import Outcome
from server.engine.scheduler import Scheduler
from server.engine.shadow import Shadow

_LONGEST_RUN = 32  # steps that are enqueued before the host waits, though it needs nothing of them


@dataclass(frozen=True, slots=True)
class Step:
    """One that ran and whose seconds are not yet known.

    Attributes:
        outcome: what it did.
        decoding: sequences that it decoded.
        batch: how many were decoding then, in this step or not.
    """

    outcome: Outcome
    decoding: Row[Sequence]
    batch: int


class Observer:
    """Learns from the steps of one engine, in the order in which they ran.

    Attributes:
        on_step: told of every step.
        costs: prices standard decoding, and is corrected by every step; None: it is not priced.
        controller: chooses what requests leave open; None: nobody does.
        shadow: measures standard decoding on the live load; None: it is not measured.
    """

    def __init__(self, scheduler: Scheduler, advancer: Advancer, strategies: Strategies) -> None:
        """Of the engine that these are parts of."""
        self.on_step: Callable[[StepStats], None] | None = None
        self.costs: CostTable | None = None
        self.controller: Controller | None = None
        self.shadow: Shadow | None = None
        self._scheduler = scheduler
        self._advancer = advancer
        self._strategies = strategies
        self._unclosed: list[Step] = []  # the host has not waited for them
        self._unobserved: list[Step] = []  # it has, and nobody has learnt from them

    @property
    def is_ahead(self) -> bool:
        """The last steps were enqueued, and the host has not waited for them."""
        return bool(self._unclosed)

    def credit(self, sequence: Sequence, delivery: Delivery, batch: int) -> None:
        """Note what one delivery of `sequence` says of it, and takes by standard decoding.

        `batch` sequences were decoding.
        """
        stats = sequence.stats
        stats.num_cycles += 1
        if self.costs is not None:
            seconds = self.costs.baseline(delivery, batch)
            stats.baseline_seconds = (stats.baseline_seconds or 0.0) + seconds
        if self.controller is not None:
            self.controller.note_text(sequence, delivery)

    def add(self, step: Step, started: float, ends: bool) -> None:
        """A step that has just ended, as far as the host knows.

        Its seconds are known now where it `ends` a sequence, whose seconds are then told to the
        client; else they may be when the host next knows what the devices have done. `started` is
        a reading of the engine's clock.
        """
        stats, scheduler = step.outcome.stats, self._scheduler
        stats.num_running = len(scheduler.running)
        stats.num_waiting = len(scheduler.waiting)
        stats.pages_used = scheduler.pages.num_used()
        step.outcome.laps.started = started
        self._unclosed.append(step)
        # A cycle reads once at least; prompts are long, and who arrives waits for what is enqueued.
        has_work = scheduler.has_work
        waits = step.outcome.has_read or stats.num_prefill_tokens or ends or not has_work
        if waits or not self._advancer.runs_ahead or len(self._unclosed) >= _LONGEST_RUN:
            self.close()

    def close(self) -> None:
        """Wait for the steps that the host has not waited for: then it knows what they took."""
        steps, self._unclosed = self._unclosed, []
        if steps:
            self._advancer.timer.close([(step.outcome.laps, step.outcome.stats) for step in steps])
        if self.shadow is not None:
            self.shadow.look(self._scheduler.running)
        self._unobserved += steps

    def observe(self) -> None:
        """Learn from the steps that the host has waited for; their tokens are told by now."""
        steps, self._unobserved = self._unobserved, []
        for step in steps:
            self._observe(step, is_last=step is steps[-1])

    def _observe(self, step: Step, is_last: bool) -> None:
        stats, running = step.outcome.stats, self._scheduler.running
        self._advancer.learn(step.outcome)
        if self.costs is not None:
            stats.prefill_seconds = self.costs.prefill_seconds(stats)
        for sequence in step.decoding:
            sequence.stats.decode_seconds += stats.decode_seconds / len(step.decoding)
        if self.costs is not None:
            stats.baseline_seconds = sum(
                self.costs.baseline(delivery, step.batch) for delivery in stats.deliveries
            )
            self.costs.observe(stats)
        # What a window took says nothing of what was chosen.
        if self.controller is not None and not self._strategies.is_shadowing:
            self.controller.observe(stats, running, step.batch, is_last)
        if self.shadow is not None:
            self.shadow.observe(stats, running, step.batch)
        if self.on_step is not None:
            self.on_step(stats)

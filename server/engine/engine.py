"""The synchronous engine: plan -> advance -> finish -> deliver. It knows no threads and no HTTP.

Where models are on several devices it may decode in half-batches: an advance of a model that is
elsewhere than where tokens are decided stays in flight while the other half of the sequences goes
on, until that half has one of its own to launch, or has gone on for long.

Where it runs ahead, whoever goes on is told its text only when the next forward is launched: a
device does not wait for text, nor for what is learnt of a step, but for token ids.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence as Row
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from server.cache.page_pool import PagePool
from server.cache.score_store import PROMPT_WINDOW, ScoreStore
from server.core.output import TokenDelta
from server.core.sampling_params import DecodingParams
from server.core.sequence import Sequence
from server.core.stats import Fault, StepStats
from server.decoding.strategies import SharedCoins, Strategies
from server.engine.advance import Advancer
from server.engine.controller import Controller
from server.engine.cost_table import CostTable
from server.engine.detokenizer import Decoder
from server.engine.faults import free_cached_memory, is_out_of_memory
from server.engine.limits import EngineLimits
from server.engine.observer import Observer, Step
from server.engine.outcome import Flight, Outcome
from server.engine.outputs import Outputs
from server.engine.scheduler import Scheduler, StepPlan
from server.engine.shadow import Shadow
from server.runner.base import ModelRunner

logger = logging.getLogger(__name__)

_UNDIVIDED_STEPS = 64  # after a forward did not fit into memory beside one in flight


@dataclass(frozen=True, slots=True)
class _News:
    """What a step verified, before it is told as text.

    Attributes:
        schedules: of the sequences whose tokens it verified, how they were decoded.
        batch: how many were decoding then.
    """

    outcome: Outcome
    schedules: Mapping[Sequence, DecodingParams]
    batch: int


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """An advance on its way, and how its sequences were before.

    Attributes:
        started: reading of the engine's clock.
        schedules: how they are decoded in it; it may end a way of decoding where another was
            chosen, and its tokens still are of it.
        num_forwards: [len(plan.sequences)] of its model so far.
    """

    flight: Flight
    started: float
    schedules: Mapping[Sequence, DecodingParams]
    num_forwards: Row[int]

    @property
    def plan(self) -> StepPlan:
        return self.flight.plan


class Engine:
    """Decodes sequences over one set of models, one advance a step."""

    def __init__(
        self,
        runners: Row[ModelRunner],
        decoder: Decoder,
        eos_token_ids: frozenset[int],
        limits: EngineLimits,
        *,
        on_step: Callable[[StepStats], None] | None = None,
        coin_seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Make an idle engine.

        Args:
            runners: of the models, in proposal order.
            decoder: turns token ids into text.
            eos_token_ids: end a text.
            limits: of this engine.
            on_step: told of every step.
            coin_seed: seeds the coins that sequences of strategy mixture share.
            clock: in seconds.
        """
        self.on_fault: Callable[[Fault], None] | None = None
        self.clock = clock
        self.limits = limits
        self.runners = tuple(runners)
        self.num_models = len(runners)
        self.vocab_size = runners[0].vocab_size
        self.max_length = min(runner.max_length for runner in runners)
        self._outputs = Outputs(decoder, eos_token_ids)
        self.eos_token_ids = eos_token_ids
        self._strategies = strategies = Strategies(SharedCoins(coin_seed))
        scores = ScoreStore(
            limits.max_sequences,
            limits.max_gamma + len(runners),
            self.vocab_size,
            [runner.dtype for runner in runners],
            [runner.device for runner in runners],
            min(PROMPT_WINDOW, limits.max_step_tokens),
            [0 if (d := runner.deferred) is None else d.state_size for runner in runners],
        )
        runs_ahead = limits.runs_ahead
        if runs_ahead is None:
            runs_ahead = all(runner.device.type == "cuda" for runner in runners)
        self._advancer = Advancer(
            runners,
            scores,
            strategies,
            eos_token_ids,
            clock,
            runs_ahead,
            limits.cpu_kernels,
        )
        self.scheduler = Scheduler(
            [PagePool(runner.num_pages, runner.page_size) for runner in runners],
            scores,
            strategies,
            max_sequences=limits.max_sequences,
            max_step_tokens=limits.max_step_tokens,
            max_gamma=limits.max_gamma,
            max_prefill_tokens=limits.max_prefill_tokens,
            prefix_cache=limits.prefix_cache,
            before_preemption=self._advancer.drafted.read_tail,
        )
        self.observer = Observer(self.scheduler, self._advancer, strategies)
        self.observer.on_step = on_step
        self.half_batches = limits.half_batches
        self._in_flight: list[_Run] = []  # one at most between steps
        self._num_undivided = 0  # steps until batches may be divided again
        self._num_beside = 0  # steps that have landed since it was launched
        # A draft, and what may stand between it and its scoring: no half waits for more.
        self._longest_flight = limits.max_gamma + len(runners)
        self._late: list[_News] = []  # to be told when the next forward is launched
        self._undelivered: list[TokenDelta] = []
        self._sequences: dict[str, Sequence] = {}

    def control(self, costs: CostTable) -> None:
        """Estimate by these costs, and choose by them what requests leave open."""
        self.observer.costs = costs
        self.observer.controller = self._strategies.chooser = Controller(
            costs,
            self._strategies,
            self.limits.max_gamma,
            self._advancer.device_numbers,
            self.half_batches,
        )

    def measure_standard(self, every_seconds: float, rounds: int) -> None:
        """Decode by standard for `rounds` tokens of each sequence, after each `every_seconds`."""
        self.observer.shadow = Shadow(self._strategies, every_seconds, rounds)

    @contextmanager
    def rehearsing(self) -> Iterator[list[StepStats]]:
        """Within it steps are no traffic: what it yields lists them, and nobody else is told.

        All of them are over whole batches, whatever is wanted otherwise.
        """
        steps: list[StepStats] = []
        on_step, half_batches = self.observer.on_step, self.half_batches
        self.observer.on_step, self.half_batches = steps.append, False
        try:
            yield steps
        finally:
            self.observer.on_step, self.half_batches = on_step, half_batches

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._undelivered)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has validated it against this engine's limits."""
        assert sequence.limit <= self.max_length
        lookup = sequence.decoding.lookup
        longest = max(*sequence.decoding.gamma, 0 if lookup is None else lookup.max_tokens)
        assert longest <= self.limits.max_gamma
        assert sequence.id not in self._sequences
        self._outputs.add(sequence)
        try:
            self.scheduler.add(sequence)
        except Exception:
            self._outputs.remove(sequence)
            raise
        self._sequences[sequence.id] = sequence

    def abort(self, sequence_id: str) -> None:
        """Drop a sequence wherever it is, and what is undelivered of it; ignores unknown ones."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            if any(sequence in run.plan.sequences for run in self._in_flight):
                landed = list(chain.from_iterable(self._land_flight()))
                self._undelivered = landed + self._undelivered
            self._tell_late()
            if not sequence.is_finished:
                self._release(sequence, sequence.num_verified)
        self._undelivered = [
            delta for delta in self._undelivered if delta.sequence_id != sequence_id
        ]
        if not self.has_work:
            self.observer.close()
            self.observer.observe()

    def step(self) -> list[TokenDelta]:
        """One advance of one model; returns what it and others added to whom."""
        return list(chain.from_iterable(self.stream_step()))

    def stream_step(self) -> Iterator[list[TokenDelta]]:
        """One `step`; yields what there is to tell before the host waits for a device."""
        started = self.clock()
        divided = self._divided()
        self._num_undivided = max(0, self._num_undivided - 1)
        if not divided:
            yield from self._land_flight()
        in_flight = [sequence for run in self._in_flight for sequence in run.plan.sequences]
        plan = self.scheduler.plan(frozenset(in_flight), divided)
        self._fail_broken()
        if plan is not None:
            yield from self._run(plan, started, divided)
        elif in_flight:
            yield from self._land_flight()
        else:
            self.observer.close()
        # Else it is told beside what is launched next, for which the device waits.
        if plan is None or not self._advancer.runs_ahead or not self.scheduler.has_work:
            yield self.hand_out()

    def hand_out(self) -> list[TokenDelta]:
        """What was decided and nobody was told; steps that have ended are observed first."""
        self._tell_late()
        self.observer.observe()
        deltas, self._undelivered = self._undelivered, []
        return deltas

    def _divided(self) -> frozenset[int]:
        """Models of whose steps others may run meanwhile, over half of the sequences."""
        controller = self.observer.controller
        is_wanted = self.half_batches if controller is None else controller.halves
        # A measurement of standard decoding is of steps one after the other.
        is_whole = self._strategies.is_shadowing or self._num_undivided > 0
        if not is_wanted or is_whole or self.scheduler.num_decoding < 2:
            return frozenset()
        return self._advancer.apart

    def _run(
        self, plan: StepPlan, started: float, divided: frozenset[int]
    ) -> Iterator[list[TokenDelta]]:
        for sequence in plan.sequences:
            if sequence.stats.first_run is None:
                sequence.stats.first_run = started
        num_forwards = [sequence.stats.forwards[plan.model] for sequence in plan.sequences]
        schedules = {sequence: sequence.schedule for sequence in plan.sequences}
        seen = [sequence.num_seen[plan.model] for sequence in plan.sequences]
        try:
            flight = self._advancer.launch(plan)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            yield from self._give_way(plan, seen)
            return
        run = _Run(flight, started, schedules, num_forwards)
        before, self._in_flight = self._in_flight, [*self._in_flight, run]
        for other in before:
            other.flight.outcome.stats.overlaps = flight.outcome.stats.overlaps = True
        yield self.hand_out()  # now that the device has something to do
        is_prompt = flight.outcome.stats.num_prefill_tokens > 0
        if plan.model not in divided and not is_prompt:
            self._land(run)
            self._num_beside += 1
            if self._num_beside > self._longest_flight:
                yield from self._land_flight()
            return
        # Only now: its device has something to do while the host waits for what was before.
        self._num_beside = 0
        for other in before:
            self._land(other)
        # Prompts are long; who decodes does not wait until they are read.
        if is_prompt:
            yield from self._land_flight()

    def _land_flight(self) -> Iterator[list[TokenDelta]]:
        """So that nothing is in flight; what there is to tell is told before the host waits."""
        for run in self._in_flight:
            yield self.hand_out()
            self._land(run)

    def _land(self, run: _Run) -> None:
        plan, outcome = run.plan, self._advancer.land(run.flight)
        self._in_flight = [other for other in self._in_flight if other is not run]
        self.scheduler.publish(s for s in plan.sequences if s not in outcome.failed)
        if outcome.ran_out:
            self._count("memory_pressure")
            self.scheduler.shrink(plan)
        else:
            self.scheduler.relax()
        batch = self.scheduler.num_decoding
        self._finish(run.schedules, outcome, batch)
        decoding = [
            sequence
            for sequence, before in zip(plan.sequences, run.num_forwards, strict=True)
            if sequence.stats.forwards[plan.model] > before
        ]
        outcome.stats.num_preempted = plan.num_preempted
        outcome.stats.num_cached = plan.num_cached
        ends = any(sequence.is_finished for sequence in plan.sequences)
        self.observer.add(Step(outcome, decoding, batch), run.started, ends)

    def _fail_broken(self) -> None:
        """End what raised an error in the scheduler."""
        if self.scheduler.broken:
            self._tell_late()
        for sequence, error in list(self.scheduler.broken.items()):
            self._fail(sequence, "out_of_memory" if is_out_of_memory(error) else "internal")

    def _give_way(self, plan: StepPlan, seen: Row[int]) -> Iterator[list[TokenDelta]]:
        """A forward did not fit into memory: undo the step, and make the next ones smaller."""
        logger.warning("a forward over %d tokens ran out of memory", sum(plan.num_tokens))
        # Before anything lands: these are as they were, whatever comes of that.
        for sequence, before in zip(plan.sequences, seen, strict=True):
            sequence.num_seen[plan.model] = before
        self.scheduler.undo(plan)
        was_beside = bool(self._in_flight)
        if was_beside:
            self._num_undivided = _UNDIVIDED_STEPS
        yield from self._land_flight()
        self.observer.close()
        yield self.hand_out()
        free_cached_memory()
        self._count("memory_pressure")
        # Alone it may fit.
        if self.scheduler.shrink(plan) or was_beside:
            return
        for sequence in plan.sequences:
            if not sequence.is_finished:  # its text may have failed just now
                self._fail(sequence, "out_of_memory")

    def _finish(
        self, schedules: Mapping[Sequence, DecodingParams], outcome: Outcome, batch: int
    ) -> None:
        """End what has failed or is complete; for others nothing depends on their text."""
        ending: dict[Sequence, DecodingParams] = {}
        going_on: dict[Sequence, DecodingParams] = {}
        faults = {s: fault for s in schedules if (fault := outcome.fault_of(s)) is not None}
        for sequence in outcome.untrusted:
            self.scheduler.pages.withdraw(sequence)
        for sequence, schedule in schedules.items():
            if entries := outcome.prompt_logprobs.get(sequence):
                self._outputs.add_prompt_logprobs(sequence, entries)
            if sequence in outcome.broken:
                continue
            if count := outcome.num_new.get(sequence, 0):
                # What was decided before a fault may end the text: then nothing had to follow.
                goes_on = sequence not in faults and self._outputs.goes_on(sequence, count)
                (going_on if goes_on else ending)[sequence] = schedule
            elif sequence not in faults and _is_answered(sequence):
                self._undelivered.append(self._outputs.end_at_prompt(sequence))
                self._release(sequence, sequence.num_verified)
        self._tell(_News(outcome, ending, batch))
        for sequence, fault in faults.items():
            if not sequence.is_finished:
                self._fail(sequence, fault)
        self._late.append(_News(outcome, going_on, batch))
        if not self._advancer.runs_ahead:
            self._tell_late()

    def _tell_late(self) -> None:
        """What could wait; nothing has landed since that changes these sequences."""
        late, self._late = self._late, []
        for news in late:
            self._tell(news)

    def _tell(self, news: _News) -> None:
        outcome = news.outcome
        for sequence, schedule in news.schedules.items():
            count, logprobs = outcome.num_new[sequence], outcome.logprobs.get(sequence, [])
            num_forced = outcome.num_forced.get(sequence, 0)
            try:
                delta = self._outputs.deliver(
                    sequence, schedule, count, num_forced, logprobs, outcome.stats
                )
                if delta.finish_reason is not None:
                    start = sequence.num_verified - count
                    self._release(sequence, start + len(delta.token_ids))
                self._undelivered.append(delta)
            except Exception:
                logger.exception("sequence %s is broken", sequence.id)
                self._break(sequence)
                continue
            self.observer.credit(sequence, outcome.stats.deliveries[-1], news.batch)

    def _break(self, sequence: Sequence) -> None:
        """Its text has failed: end it, or where it is in flight let it end when that lands."""
        for run in self._in_flight:
            if sequence in run.plan.sequences:
                run.flight.outcome.broken[sequence] = "internal"
                return
        self._fail(sequence, "internal")

    def _fail(self, sequence: Sequence, fault: Fault) -> None:
        """End one sequence that cannot go on."""
        self._count(fault)
        self._undelivered.append(self._outputs.fail(sequence, fault))
        if sequence.id in self._sequences:
            self._release(sequence, sequence.num_verified)

    def _count(self, fault: Fault) -> None:
        if self.on_fault is not None:
            self.on_fault(fault)

    def _release(self, sequence: Sequence, num_verified: int) -> None:
        self.scheduler.release(sequence)
        sequence.finish(num_verified)
        del self._sequences[sequence.id]
        self._outputs.remove(sequence)


def _is_answered(sequence: Sequence) -> bool:
    """It asked for log-probabilities of its prompt alone, and has them."""
    return sequence.params.max_tokens == 0 and not sequence.scores_prompt

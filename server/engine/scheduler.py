"""Which sequences run, which model advances next over which of them, and whose pages make room.

There is no prefill phase and no decoding phase: a sequence wants a model to consume what it has
not seen, few tokens or many. The waiting come in by priority, then first come, first served; the
youngest is preempted first, whatever its priority.

A plan may be made while others are in flight: their sequences are left as they are.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence as Row
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import NamedTuple

from server.cache.page_pool import PagePool
from server.cache.page_table import PageTable
from server.cache.score_store import ScoreStore
from server.core.sequence import Sequence, Status
from server.decoding.strategies import Strategies, used_models
from server.decoding.turns import next_model
from server.engine.sequence_pages import SequencePages

logger = logging.getLogger(__name__)

# Steps that must go well, after one that ran out of memory, before steps may be twice as large.
_SMOOTH_STEPS = 64


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One advance of one model.

    Attributes:
        model: index of the model.
        sequences: over which it advances.
        num_tokens: how many unseen tokens each of them feeds.
        pages: each one's page table in this model.
        num_preempted: sequences that lost their pages since the plan before.
        num_cached: [num_models] tokens whose KV was found since then, not computed.
    """

    model: int
    sequences: tuple[Sequence, ...]
    num_tokens: tuple[int, ...]
    pages: tuple[Row[int], ...]
    num_preempted: int = 0
    num_cached: tuple[int, ...] = ()


class _Want(NamedTuple):
    sequence: Sequence
    model: int
    num_tokens: int


@dataclass(slots=True)
class _Step:
    """A plan in the making.

    Attributes:
        model: that advances.
        budget: tokens that may still be fed.
        reading: of those, what feeds longer than a decoding sequence's may take.
        room: decoding sequences that may still be taken.
        num_tokens: what each sequence feeds.
        being_read: keys of the pages that this step fills.
    """

    model: int
    budget: int
    reading: int
    room: int
    num_tokens: dict[Sequence, int] = field(default_factory=dict)
    being_read: set[bytes] = field(default_factory=set)

    def is_read(self, table: PageTable, want: _Want) -> bool:
        """Does another sequence read most of this want now? Then it is found after the step."""
        sequence = want.sequence
        start = sequence.num_seen[self.model]
        keys = table.keys_between(sequence.token_ids, start, sequence.first_open - 1)
        num_shared = sum(1 for _ in takewhile(self.being_read.__contains__, keys))
        return 2 * num_shared * table.page_size >= want.num_tokens


class _MustLand(Exception):
    """The youngest sequence is to be preempted, and is in flight."""


class Scheduler:
    """Owns the waiting and running sequences and their page tables."""

    def __init__(
        self,
        pools: Row[PagePool],
        scores: ScoreStore,
        strategies: Strategies,
        *,
        max_sequences: int,
        max_step_tokens: int,
        max_gamma: int,
        max_prefill_tokens: int,
        prefix_cache: bool,
        before_preemption: Callable[[Sequence], None],
    ) -> None:
        """One with nothing to do; for the limits see `EngineConfig`.

        `before_preemption` is told of a sequence that still holds its slot.
        """
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        # What raised an error here, and holds nothing any more; to be released.
        self.broken: dict[Sequence, Exception] = {}
        self.pages = SequencePages(pools, prefix_cache)
        self._num_models = len(pools)
        self._scores = scores
        self._strategies = strategies
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens
        self._max_prefill_tokens = max_prefill_tokens
        # A decoding sequence has no more unseen tokens than this; a prompt or recomputation may.
        assert max_step_tokens >= max_gamma + len(pools)
        self._short = max_gamma + len(pools)
        # What one step may take: less for a while after one that did not fit into memory.
        self._sequence_limit = max_sequences
        self._token_limit = max_step_tokens
        self._num_smooth = 0  # steps since then
        self._before_preemption = before_preemption
        self._num_preempted = 0  # since the last plan
        # Whose few tokens full steps have left out, for longest first; they have precedence.
        self._left_out: dict[Sequence, None] = {}
        self._passed_over = [0] * len(pools)  # steps for which somebody has wanted each model
        self._waited: dict[Sequence, int] = {}  # steps since each one's last
        self._in_flight: Collection[Sequence] = ()  # while a plan is made

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.broken)

    @property
    def num_decoding(self) -> int:
        """Running sequences that are past their prompts."""
        return sum(
            not sequence.is_resuming and max(sequence.num_seen) >= sequence.num_prompt
            for sequence in self.running
        )

    def add(self, sequence: Sequence) -> None:
        """Queue it behind all that wait with its priority or a better one; its id is its own."""
        self.pages.add(sequence)
        place = len(self.waiting)
        while place and self.waiting[place - 1].priority > sequence.priority:
            place -= 1
        self.waiting.insert(place, sequence)

    def release(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, with its pages and its slot."""
        self._take_out(sequence)
        self.broken.pop(sequence, None)
        self.pages.remove(sequence)

    def publish(self, sequences: Iterable[Sequence]) -> None:
        """After a step over them: let others find the full pages of what is verified."""
        for sequence in sequences:
            try:
                self.pages.publish(sequence)
            except Exception as error:
                self._break(sequence, error)

    def plan(
        self, in_flight: Collection[Sequence] = (), divided: Collection[int] = ()
    ) -> StepPlan | None:
        """The next advance, over one sequence at least; None when nothing runs.

        None too where nothing can be planned before those `in_flight` have landed. Of `divided`
        models a step takes half of the decoding sequences at most.
        """
        self._in_flight = in_flight
        while True:
            self._admit()
            wants = self._wants()
            if not wants:
                return None
            try:
                plan = self._fill(self._choose_model(wants), wants, divided)
            except _MustLand:
                return None
            # Empty where the only one that wanted the model was the youngest, and preempted itself.
            if plan.sequences:
                num_preempted, self._num_preempted = self._num_preempted, 0
                num_cached = self.pages.take_num_cached()
                return replace(plan, num_preempted=num_preempted, num_cached=num_cached)

    def undo(self, plan: StepPlan) -> None:
        """It came to nothing: the next one tells what it had to tell."""
        self._num_preempted += plan.num_preempted
        self.pages.return_num_cached(plan.num_cached)

    def shrink(self, plan: StepPlan) -> bool:
        """Make the next steps smaller than `plan`, which ran out of memory.

        Nobody is preempted: pages and scores are allocated once, and what runs out is what a
        forward needs besides. False where `plan` was as small as can be.
        """
        self._num_smooth = 0
        if max(plan.num_tokens) > self._short:
            self._token_limit = max(self._short, sum(plan.num_tokens) // 2)
        elif len(plan.sequences) > 1:
            self._sequence_limit = len(plan.sequences) // 2
        else:
            return False
        return True

    def relax(self) -> None:
        """A step went well: after some of them, allow larger ones again."""
        if (
            self._sequence_limit == self._max_sequences
            and self._token_limit == self._max_step_tokens
        ):
            return
        self._num_smooth += 1
        if self._num_smooth >= _SMOOTH_STEPS:
            self._num_smooth = 0
            self._sequence_limit = min(self._max_sequences, 2 * self._sequence_limit)
            self._token_limit = min(self._max_step_tokens, 2 * self._token_limit)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page and slot is held exactly once."""
        without = [*self.waiting, *self.broken]
        self.pages.check_integrity((s.id for s in [*self.running, *without]), without)
        slots = [sequence.slot for sequence in self.running]
        assert len(set(slots)) == len(slots)
        assert self._scores.num_free == self._max_sequences - len(slots)
        for sequence in [*self.running, *self.waiting]:
            sequence.check()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_sequences:
            sequence = self.waiting[0]
            try:
                if not self._reserve(sequence):
                    return
                self._start(sequence)
            except Exception as error:
                self._break(sequence, error)

    def _break(self, sequence: Sequence, error: Exception) -> None:
        """An error in the path of one sequence ends that one; the engine says so."""
        logger.error("sequence %s is broken", sequence.id, exc_info=error)
        self._take_out(sequence)
        self.broken[sequence] = error

    def _take_out(self, sequence: Sequence) -> None:
        """From where it is queued, if it is, and out of all that it holds."""
        queue: list[Sequence] | deque[Sequence]
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self._free(sequence)

    def _start(self, sequence: Sequence) -> None:
        sequence.slot = self._scores.take_slot()
        sequence.status = Status.RUNNING
        self.running.append(self.waiting.popleft())
        if not sequence.num_generated and not sequence.num_pending:
            self._strategies.settle(sequence)
        decoding = sequence.decoding
        takes_coins = decoding.strategy == "mixture" and decoding.shared_coins
        if takes_coins and sequence.coin_base is None:
            self._strategies.shared_coins.join(sequence)
        if sequence.scores_prompt:
            sequence.prompt_slot = self._scores.take_prompt_slot(sequence.slot)
            sequence.open_window(self._scores.num_positions(sequence.prompt_slot))

    def _reserve(self, sequence: Sequence) -> bool:
        """Give it pages of every model, or none at all."""
        if not any(sequence.resume_at):
            _set_out(sequence)
        return self.pages.reserve(sequence, _resuming(sequence))

    def _wants(self) -> list[_Want]:
        wants = []
        waiting = self._strategies.shared_coins.ahead(self.running).union(self._in_flight)
        for sequence in [each for each in self.running if each not in waiting]:
            try:
                wants.append(self._want(sequence))
            except Exception as error:
                self._break(sequence, error)
        return wants

    def _want(self, sequence: Sequence) -> _Want:
        if sequence.is_resuming:
            for model in _resuming(sequence):
                self.pages.adopt(sequence, model)
        if sequence.is_resuming:
            model = _resuming(sequence)[0]
        else:
            model = self._strategies.of(sequence).next_model(sequence)
            if sequence.num_unseen(model) > self._short:
                self.pages.adopt(sequence, model)
        num_tokens = sequence.num_unseen(model)
        assert num_tokens > 0, f"{sequence.id} wants model {model}, which has seen everything"
        return _Want(sequence, model, num_tokens)

    def _choose_model(self, wants: list[_Want]) -> int:
        """The one whose turn it is among decoding sequences; nobody is passed over for long."""
        wanted: Counter[int] = Counter()
        short: Counter[int] = Counter()
        for want in wants:
            # Who has waited counts for more, or those for whom steps have no room would be slower.
            weight = 1 + self._waited.get(want.sequence, 0)
            wanted[want.model] += weight
            if want.num_tokens <= self._short:
                short[want.model] += weight
        model = next_model(short or wanted)
        overdue = max(wanted, key=lambda k: self._passed_over[k])
        if self._passed_over[overdue] >= self._patience(overdue, wants):
            model = overdue
        for k in range(self._num_models):
            self._passed_over[k] = self._passed_over[k] + 1 if k in wanted and k != model else 0
        return model

    def _patience(self, model: int, wants: list[_Want]) -> int:
        """Steps for which those who want `model` are passed over.

        A draft of those who decode: prompts are read with their scoring. Where none of them will
        ever want it, one step of each other model: who decodes then reads no more of prompts for
        each token than beside texts that all models score.
        """
        decoding = [want.sequence for want in wants if want.num_tokens <= self._short]
        if not decoding or any(model in used_models(s.schedule) for s in decoding):
            return self._short + 1
        return max(1, self._num_models - 1)

    def _fill(self, model: int, wants: list[_Want], divided: Collection[int]) -> StepPlan:
        """Decoding sequences first, then prompts with what the token budgets leave."""
        room = max(1, -(-self.num_decoding // 2)) if model in divided else len(wants)
        step = _Step(model, self._token_limit, self._reading(model, wants), room)
        for want in self._candidates(model, wants):
            if self._is_running(want.sequence):
                try:
                    self._take(want, step)
                except _MustLand:
                    raise
                except Exception as error:
                    step.num_tokens.pop(want.sequence, None)
                    self._break(want.sequence, error)
        planned = [sequence for sequence in self.running if sequence in step.num_tokens]
        self._waited = {
            want.sequence: self._waited.get(want.sequence, 0) + 1
            for want in wants
            if want.sequence not in step.num_tokens
        }
        return StepPlan(
            model=model,
            sequences=tuple(planned),
            num_tokens=tuple(step.num_tokens[sequence] for sequence in planned),
            pages=tuple(self.pages.table(sequence, model).pages for sequence in planned),
        )

    def _reading(self, model: int, wants: list[_Want]) -> int:
        """How many tokens of prompts a step may take.

        So many for each token that decoding sequences feed: every model reads every token of a text
        once, so that a text delays itself for prompts as often whatever its strategy, and prompts
        are read as fast.
        """
        short = [want for want in wants if want.num_tokens <= self._short]
        if not short:
            return self._token_limit
        fed = [want.num_tokens for want in short if want.model == model]
        return self._max_prefill_tokens * sum(fed) // len(fed) if fed else self._max_prefill_tokens

    def _candidates(self, model: int, wants: list[_Want]) -> list[_Want]:
        """Everybody that `model` could feed now, long feeds last."""
        chosen = [want for want in wants if want.model == model]
        # A prompt may go to any model that lacks it, in any order.
        chosen += [
            _Want(want.sequence, model, want.sequence.num_unseen(model))
            for want in wants
            if want.model != model
            and want.sequence.num_seen[model] < want.sequence.resume_at[model]
        ]
        turns = {sequence: turn for turn, sequence in enumerate(self._left_out)}
        return sorted(
            chosen,
            key=lambda want: (
                want.num_tokens > self._short,
                turns.get(want.sequence, len(turns)),
            ),
        )

    def _take(self, want: _Want, step: _Step) -> None:
        """Add as much of a want to the step as its budgets leave."""
        sequence, table = want.sequence, self.pages.table(want.sequence, step.model)
        is_long = want.num_tokens > self._short
        start = sequence.num_seen[step.model]
        count = _chunk(want, min(step.budget, step.reading) if is_long else step.budget)
        is_resuming = sequence.is_resuming
        has_room = step.room > 0 or is_resuming
        is_full = count <= 0 or len(step.num_tokens) >= self._sequence_limit
        if not is_long and (is_full or not has_room):
            self._left_out.setdefault(sequence)
            return
        if is_long and (is_full or step.is_read(table, want)):
            return
        if table.num_missing(start + count):
            self._make_room(sequence, step.model, start + count, step.num_tokens)
            if not self._is_running(sequence):
                return
            table.grow(start + count)
        self._left_out.pop(sequence, None)
        step.num_tokens[sequence] = count
        step.budget -= count
        step.room -= not is_resuming
        if is_long:
            step.reading -= count
            end = min(start + count, sequence.num_verified)
            step.being_read.update(table.keys_between(sequence.token_ids, start, end))

    def _make_room(
        self, sequence: Sequence, model: int, num_tokens: int, planned: dict[Sequence, int]
    ) -> None:
        """Preempt the youngest until `sequence` fits, itself if it is the youngest."""
        while self.pages.lacks(sequence, model, num_tokens):
            victim = self.running[-1]
            if victim in self._in_flight:
                raise _MustLand
            planned.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                break

    def _is_running(self, sequence: Sequence) -> bool:
        return sequence.status is Status.RUNNING and sequence not in self.broken

    def _preempt(self, sequence: Sequence) -> None:
        """Take its pages, and let it wait; where that raises an error, it is broken."""
        try:
            self._before_preemption(sequence)
        except Exception as error:
            self._break(sequence, error)
            return
        self._take_out(sequence)
        sequence.forget()
        self._num_preempted += 1
        self.waiting.appendleft(sequence)

    def _free(self, sequence: Sequence) -> None:
        self._left_out.pop(sequence, None)
        self.pages.free(sequence)
        self._scores.give_back_prompt_slot(sequence.prompt_slot)
        if sequence.slot >= 0:
            self._scores.give_back(sequence.slot)
        sequence.slot = sequence.prompt_slot = -1


def _set_out(sequence: Sequence) -> None:
    """Before the first admission: models that score the first position begin with the prompt."""
    # Of a mixture, coins decide who needs the prompt; the others catch up when theirs comes.
    if sequence.decoding.strategy != "mixture":
        for model in sequence.decoding.combination.scorers:
            sequence.resume_at[model] = sequence.num_prompt


def _resuming(sequence: Sequence) -> list[int]:
    """Models that must still consume the prompt, or what a preemption took."""
    behind = zip(sequence.num_seen, sequence.resume_at, strict=True)
    return [model for model, (seen, until) in enumerate(behind) if seen < until]


def _chunk(want: _Want, budget: int) -> int:
    """How many of the wanted tokens to feed now.

    A feed that decides something is never split: what is decided together must not depend on how
    full the step is, or a request's text would depend on its neighbours.
    """
    if want.num_tokens <= budget:
        return want.num_tokens
    sequence = want.sequence
    if sequence.is_resuming:
        return budget
    undeciding = sequence.num_verified - 1 - sequence.num_seen[want.model]
    return min(budget, undeciding)

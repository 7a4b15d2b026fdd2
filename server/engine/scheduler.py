"""Which sequences run, which model advances next over which of them, and whose pages make room.

There is no prefill phase and no decoding phase: a sequence wants a model to consume what it has
not seen, few tokens or many. The waiting come in by priority, then first come, first served; the
youngest is preempted first, whatever its priority.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Row
from dataclasses import dataclass, replace

from server.cache.page_pool import PagePool
from server.cache.page_table import PageTable
from server.cache.score_store import ScoreStore
from server.core.sequence import Sequence, Status
from server.decoding.strategies import Strategies

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
        num_preempted: sequences that lost their pages to this plan.
    """

    model: int
    sequences: tuple[Sequence, ...]
    num_tokens: tuple[int, ...]
    pages: tuple[Row[int], ...]
    num_preempted: int


@dataclass(frozen=True, slots=True)
class _Want:
    sequence: Sequence
    model: int
    num_tokens: int


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
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self._pools = pools
        self._scores = scores
        self._strategies = strategies
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens
        # A decoding sequence has no more unseen tokens than this; a prompt or recomputation may.
        assert max_step_tokens >= max_gamma + len(pools)
        self._short = max_gamma + len(pools)
        # Lower than the two above for a while after a step that did not fit into memory.
        self._running_limit = max_sequences
        self._token_limit = max_step_tokens
        self._num_smooth = 0  # steps since then
        self._tables: dict[str, tuple[PageTable, ...]] = {}
        self._passed_over = [0] * len(pools)  # steps for which somebody has wanted each model

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_decoding(self) -> int:
        """Running sequences that are past their prompts."""
        return sum(not sequence.is_resuming for sequence in self.running)

    def num_fitting(self, num_tokens: int) -> int:
        """Sequences of `num_tokens` tokens that the free pages of all models hold."""
        return min(pool.num_free // pool.pages_for(num_tokens) for pool in self._pools)

    def add(self, sequence: Sequence) -> None:
        """Queue it behind all that wait with its priority or a better one."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].priority > sequence.priority:
            place -= 1
        self.waiting.insert(place, sequence)

    def release(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, with its pages and its slot."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._free(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def plan(self) -> StepPlan | None:
        """The next advance, over one sequence at least; None when nothing runs."""
        num_preempted = 0
        while True:
            self._admit()
            wants = [self._want(sequence) for sequence in self.running]
            if not wants:
                return None
            plan = self._fill(self._choose_model(wants), wants)
            num_preempted += plan.num_preempted
            # Empty where the only one that wanted the model was the youngest, and preempted itself.
            if plan.sequences:
                return replace(plan, num_preempted=num_preempted)

    def shrink(self, plan: StepPlan) -> bool:
        """Make the next steps smaller than `plan`, which ran out of memory.

        Preempts the youngest; False where `plan` was as small as can be. Its sequences must be as
        they were before it.
        """
        self._num_smooth = 0
        num_tokens = sum(plan.num_tokens)
        if len(plan.sequences) > 1:
            self._running_limit = len(plan.sequences) // 2
            while len(self.running) > self._running_limit:
                self._preempt(self.running[-1])
        elif num_tokens > self._short:
            self._token_limit = max(self._short, num_tokens // 2)
        else:
            return False
        return True

    def relax(self) -> None:
        """A step went well: after some of them, allow larger ones again."""
        if (
            self._running_limit == self._max_sequences
            and self._token_limit == self._max_step_tokens
        ):
            return
        self._num_smooth += 1
        if self._num_smooth >= _SMOOTH_STEPS:
            self._num_smooth = 0
            self._running_limit = min(self._max_sequences, 2 * self._running_limit)
            self._token_limit = min(self._max_step_tokens, 2 * self._token_limit)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page and slot is held exactly once."""
        tables = list(self._tables.values())
        for k, pool in enumerate(self._pools):
            pool.check_integrity(page for table in tables for page in table[k].pages)
        assert set(self._tables) == {sequence.id for sequence in self.running}
        slots = [sequence.slot for sequence in self.running]
        assert len(set(slots)) == len(slots)
        assert self._scores.num_free == self._max_sequences - len(slots)
        for sequence in [*self.running, *self.waiting]:
            sequence.check()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._running_limit:
            sequence = self.waiting[0]
            # The page of the next token included: nobody is admitted only to be preempted.
            num_tokens = len(sequence) + 1
            if any(pool.pages_for(num_tokens) > pool.num_free for pool in self._pools):
                return
            self.waiting.popleft()
            self._start(sequence, num_tokens)

    def _start(self, sequence: Sequence, num_tokens: int) -> None:
        tables = tuple(PageTable(pool) for pool in self._pools)
        for table in tables:
            table.grow(num_tokens)
        self._tables[sequence.id] = tables
        sequence.slot = self._scores.take_slot()
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        if not any(sequence.resume_at):
            self._prepare(sequence)
        if sequence.scores_prompt:
            sequence.prompt_slot = self._scores.take_prompt_slot(sequence.slot)
            sequence.open_window(self._scores.num_positions(sequence.prompt_slot))

    def _prepare(self, sequence: Sequence) -> None:
        """First admission: models that score the first position begin with the prompt."""
        decoding = sequence.decoding
        if decoding.strategy == "mixture":
            # Coins decide who needs the prompt; the others catch up when theirs comes.
            if decoding.shared_coins and sequence.coin_base is None:
                self._strategies.shared_coins.join(sequence)
            return
        for model in decoding.combination.scorers:
            sequence.resume_at[model] = sequence.num_prompt

    def _want(self, sequence: Sequence) -> _Want:
        if sequence.is_resuming:
            behind = zip(sequence.num_seen, sequence.resume_at, strict=True)
            model = next(k for k, (seen, until) in enumerate(behind) if seen < until)
        else:
            model = self._strategies.of(sequence).next_model(sequence)
        num_tokens = sequence.num_unseen(model)
        assert num_tokens > 0, f"{sequence.id} wants model {model}, which has seen everything"
        return _Want(sequence, model, num_tokens)

    def _choose_model(self, wants: list[_Want]) -> int:
        """The earliest in proposal order that a decoding sequence wants.

        So sequences draft together and are scored together; but nobody is passed over for longer
        than a cycle.
        """
        wanted = {want.model for want in wants}
        short = {want.model for want in wants if want.num_tokens <= self._short}
        model = min(short or wanted)
        overdue = max(wanted, key=lambda k: self._passed_over[k])
        if self._passed_over[overdue] > self._short:
            model = overdue
        for k in range(len(self._pools)):
            self._passed_over[k] = self._passed_over[k] + 1 if k in wanted and k != model else 0
        return model

    def _fill(self, model: int, wants: list[_Want]) -> StepPlan:
        """Decoding sequences first, then prompts with what the token budget leaves."""
        chosen = [want for want in wants if want.model == model]
        # A prompt may go to any model that lacks it, in any order.
        chosen += [
            _Want(want.sequence, model, want.sequence.num_unseen(model))
            for want in wants
            if want.model != model
            and want.sequence.num_seen[model] < want.sequence.resume_at[model]
        ]
        chosen.sort(key=lambda want: want.num_tokens > self._short)
        budget = self._token_limit
        num_tokens: dict[Sequence, int] = {}
        victims = 0
        for want in chosen:
            count = _chunk(want, budget)
            if count <= 0 or want.sequence.status is not Status.RUNNING:
                continue
            needed = want.sequence.num_seen[model] + count
            victims += self._make_room(want.sequence, model, needed, num_tokens)
            if want.sequence.status is Status.RUNNING:
                self._tables[want.sequence.id][model].grow(needed)
                num_tokens[want.sequence] = count
                budget -= count
        planned = [sequence for sequence in self.running if sequence in num_tokens]
        return StepPlan(
            model=model,
            sequences=tuple(planned),
            num_tokens=tuple(num_tokens[sequence] for sequence in planned),
            pages=tuple(self._tables[sequence.id][model].pages for sequence in planned),
            num_preempted=victims,
        )

    def _make_room(
        self, sequence: Sequence, model: int, num_tokens: int, planned: dict[Sequence, int]
    ) -> int:
        """Preempt the youngest until `sequence` fits, itself if it is the youngest."""
        victims = 0
        table = self._tables[sequence.id][model]
        while table.num_missing(num_tokens) > self._pools[model].num_free:
            victim = self.running[-1]
            planned.pop(victim, None)
            self._preempt(victim)
            victims += 1
            if victim is sequence:
                break
        return victims

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        sequence.forget()
        self.waiting.appendleft(sequence)

    def _free(self, sequence: Sequence) -> None:
        for table in self._tables.pop(sequence.id):
            table.release()
        self._scores.give_back_prompt_slot(sequence.prompt_slot)
        self._scores.give_back(sequence.slot)
        sequence.slot = sequence.prompt_slot = -1

    def pages_used(self) -> tuple[int, ...]:
        return tuple(pool.num_used for pool in self._pools)


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

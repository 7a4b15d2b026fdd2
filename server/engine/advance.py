"""The one primitive: advance(k, sequences).

    feed model k the tokens it has not seen
    verify, in order, each pending token whose scorers have now all scored it
    where nothing is pending and a grammar allows one token only, take it
    where nothing is pending and all scorers have scored the next position, draw from r
    after what was drawn, take what a grammar allows alone
    where nothing is pending, prompt lookup may propose some tokens
    where the tail survived and the strategy allows it, model k proposes the next token

Where it *runs ahead*, a proposed token stays on the device, unread, until it is verified: drafting
and the forward that scores the draft are enqueued without waiting for anything, and the ids come
to the host together with what became of them.

An advance is launched and landed: the forward is enqueued, then what it decides. Between the two
others may be, over other sequences; where models are on several GPUs these work meanwhile.

Prefill, drafting, scoring, bonus tokens, catching up after a rejection and recomputation after a
preemption are all this. A *bonus* is the token a model proposes right after it has verified or
scored proposals of others.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence as Row
from typing import NamedTuple

import torch

from server.cache.devices import device_numbers
from server.cache.score_store import ScoreStore
from server.core.lookup import LOOKUP
from server.core.proposal import Proposal
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.decoding.strategies import Strategies, is_scored, num_verifiable
from server.decoding.verify import INVALID, Decisions, verdicts
from server.decoding.warp import Place, depends_on_tokens
from server.engine.decider import Decider, Way, find_kernels
from server.engine.distributions import Distributions, grouped
from server.engine.drafted_ids import DraftedIds
from server.engine.faults import free_cached_memory, is_out_of_memory
from server.engine.forcing import force, forced_token
from server.engine.guesser import Guesser
from server.engine.laps import Timer
from server.engine.logprobs import Decided, Logprobs
from server.engine.outcome import Flight, Outcome, guarding
from server.engine.probes import Probes
from server.engine.scheduler import StepPlan
from server.engine.scores import Scores
from server.runner.attention_choice import CpuKernels
from server.runner.base import Batch, ModelRunner, Span
from server.runner.plan import num_attended

logger = logging.getLogger(__name__)

Window = tuple[Sequence, int]  # a sequence, and how many of its pending tokens are decided

_MIN_SHORTLIST_GAMMA = 3  # below, the second product takes what the shortlist saves


class _Packed(NamedTuple):
    """The input of one forward.

    Attributes:
        spans: of all sequences.
        places: that their kept rows score.
        decoding: spans that are not all of prompt or recomputation, by sequence.
    """

    spans: tuple[Span, ...]
    places: list[Place]
    decoding: dict[Sequence, Span]


class Advancer:
    """The tensors and the code of `advance`; sequences hold none of either."""

    def __init__(
        self,
        runners: Row[ModelRunner],
        scores: ScoreStore,
        strategies: Strategies,
        eos_token_ids: frozenset[int],
        clock: Callable[[], float] = time.perf_counter,
        runs_ahead: bool = False,
        cpu_kernels: CpuKernels = "off",
    ) -> None:
        self.runs_ahead = runs_ahead
        self._runners = runners
        self._store = scores
        self._has_shortlists = any(runner.deferred is not None for runner in runners)
        self._scores = Scores(runners, scores, clock)
        self._strategies = strategies
        self._distributions = Distributions(
            self._scores, strategies, eos_token_ids, len(runners), runners[0].vocab_size
        )
        kernels = find_kernels(runners, self._scores, strategies, eos_token_ids, cpu_kernels)
        self._decider = Decider(self._distributions, kernels)
        self._logprobs = Logprobs(self._distributions)
        self._guesser = Guesser(strategies)
        # As long as a draft: steps, and graphs, are made for so many tokens of a sequence.
        self._most_forced = scores.capacity - len(runners)
        self._probes = Probes(strategies, self._distributions)
        self._device = self._scores.device
        self.device_numbers = device_numbers([runner.device for runner in runners])
        # Models that are elsewhere than where tokens are decided; or all but one.
        elsewhere = frozenset(model for model, at in enumerate(self.device_numbers) if at)
        self.apart = elsewhere or frozenset(range(1, len(runners)))
        self.timer = Timer(self._device, [runner.device for runner in runners], clock)
        self.drafted = DraftedIds(self._scores, scores.num_rows, runs_ahead)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Flight:
        """Enqueue the plan's forward; mutates `num_seen` of its model, scores and KV.

        Where the forward fails, nothing but `num_seen` has changed.
        """
        laps = self.timer.begin()
        outcome = Outcome(StepStats(plan.model, num_sequences=len(plan.sequences)), laps)
        # Recomputation restores a state; it must not decide anything anew.
        deciding = frozenset(s for s in plan.sequences if not s.is_resuming)
        before = {sequence: sequence.num_verified for sequence in plan.sequences}
        drafting: frozenset[Sequence] = frozenset()
        if self._has_shortlists:
            drafting = frozenset(s for s in plan.sequences if self._drafts_short(s, plan.model))
        sent = self._feed(plan, outcome)
        return Flight(plan, outcome, deciding, before, drafting, sent)

    @torch.inference_mode()
    def land(self, flight: Flight) -> Outcome:
        """Decide what the forward decides; mutates the sequences and what is kept of them."""
        plan, outcome = flight.plan, flight.outcome
        self.timer.join(plan.model, outcome.laps)
        self._scores.receive(plan.model, flight.sent)
        self._scores.head_seconds = 0.0
        self._score_prompts(plan.sequences, outcome)
        self._decide(flight)
        for sequence, start in flight.verified_before.items():
            if sequence.num_verified > start:
                outcome.num_new[sequence] = sequence.num_verified - start
        outcome.stats.num_forced = sum(outcome.num_forced.values())
        self._report(flight.verified_before, outcome)
        outcome.laps.head_seconds = self._scores.head_seconds
        self.timer.mark_decided(outcome.laps)
        return outcome

    def learn(self, outcome: Outcome) -> None:
        """Tell who chooses what became of proposals; it may be later than it became."""
        chooser = self._strategies.chooser
        if chooser is not None:
            for sequence, proposer, is_accepted in outcome.verdicts:
                chooser.add(sequence, proposer, float(is_accepted))

    def _decide(self, flight: Flight) -> None:
        """Verify, draw and propose; an error in the path of one sequence breaks that one only."""
        sequences, outcome = flight.plan.sequences, flight.outcome
        try:
            self._decide_together(flight, sequences)
        except Exception as error:
            outcome.ran_out = is_out_of_memory(error)
            logger.warning("a step failed; its sequences are tried one by one: %r", error)
            free_cached_memory()
            for sequence in sequences:
                # What was left undone: decisions that were made are not made again.
                if sequence not in outcome.failed:
                    with guarding(sequence, outcome):
                        self._decide_together(flight, [sequence])

    def _decide_together(self, flight: Flight, sequences: Row[Sequence]) -> None:
        deciding = [sequence for sequence in sequences if sequence in flight.deciding]
        outcome = flight.outcome
        verified = self._verify(deciding, outcome)
        self._force(verified, outcome)  # else the first of them would be drawn
        # Others settle after they have drawn: had they joined shared coins before, they would be
        # a coin ahead of those who draw with them.
        first = (s for s in deciding if s.coin_base is not None or not self._may_draw(s))
        self._settle(first, outcome)
        self._draw(sequences, outcome)
        self._force(deciding, outcome)
        looking = [sequence for sequence in sequences if sequence not in outcome.failed]
        self._guesser.look_up(looking, outcome.stats)
        self._propose(flight, deciding, verified)

    def _feed(self, plan: StepPlan, outcome: Outcome) -> torch.cuda.Event | None:
        """One packed forward; scores of undecided positions go to the store."""
        runner = self._runners[plan.model]
        packed = self._pack(plan, outcome.stats)
        batch = Batch(packed.spans, self.drafted.for_model(plan.model, runner.device, packed.spans))
        _count(batch, [*packed.decoding.values()], runner, outcome.stats)
        defer = self._has_shortlists and any(
            self._defers(sequence, plan.model) for sequence in plan.sequences
        )
        self.timer.start_forward(plan.model, outcome.laps)
        sent = self._scores.forward(plan.model, batch, packed.places, defer)
        self.timer.stop_forward(plan.model, outcome.laps)
        for sequence in packed.decoding:
            sequence.stats.forwards[plan.model] += 1
        return sent

    def _pack(self, plan: StepPlan, stats: StepStats) -> _Packed:
        """What the plan feeds; `num_seen` moves on, and tokens of prompts are counted."""
        spans: list[Span] = []
        decoding: dict[Sequence, Span] = {}
        places: list[Place] = []
        for sequence, count, pages in zip(plan.sequences, plan.num_tokens, plan.pages, strict=True):
            start = sequence.num_seen[plan.model]
            end = start + count
            # After token i the model scores position i + 1.
            first = max(start + 1, sequence.first_open)
            kept = range(first, end + 1)
            spans.append(Span(pages, start, sequence.token_ids[start:end], len(kept)))
            places += [(sequence, position) for position in kept]
            sequence.num_seen[plan.model] = end
            num_prefill = _num_prefill(sequence, plan.model, start, end)
            stats.num_prefill_tokens += num_prefill
            if num_prefill < count:
                decoding[sequence] = spans[-1]
        return _Packed(tuple(spans), places, decoding)

    def _score_prompts(self, sequences: Iterable[Sequence], outcome: Outcome) -> None:
        for sequence in sequences:
            if sequence.scores_prompt:
                with guarding(sequence, outcome):
                    self._score_prompt(sequence, outcome)

    def _score_prompt(self, sequence: Sequence, outcome: Outcome) -> None:
        """Log-probabilities of the prompt's tokens that every scorer has now scored."""
        entries = self._logprobs.of_prompt(sequence)
        outcome.has_read |= bool(entries)
        if any(math.isnan(entry.logprob) for entry in entries):
            outcome.failed.add(sequence)
            outcome.untrusted.add(sequence)
            return
        outcome.prompt_logprobs[sequence] = entries
        sequence.num_scored += len(entries)
        sequence.open_window(self._store.num_positions(sequence.prompt_slot))
        if not sequence.scores_prompt:
            self._store.give_back_prompt_slot(sequence.prompt_slot)
            sequence.prompt_slot = -1

    def _verify(self, sequences: Iterable[Sequence], outcome: Outcome) -> set[Sequence]:
        """Decide pending tokens; returns the sequences that had any to decide."""
        windows = [
            (sequence, count)
            for sequence in sequences
            if sequence.tail and (count := num_verifiable(self._strategies.of(sequence), sequence))
        ]
        if not windows:
            return set()
        outcome.stats.tails += [s.num_pending for s, _ in windows]
        groups = grouped(windows, lambda window: self._decider.way(window[0]))
        decisions = [self._decisions(group, way) for way, group in groups]
        # All groups are enqueued; here the host waits for them.
        decided_ids = torch.cat(decisions).flatten()
        read = _pairs(self.drafted.read_with(decided_ids, [sequence for sequence, _ in windows]))
        outcome.has_read = True
        decided = [window for _, group in groups for window in group]
        # Shorter where a proposer turned out to have had nothing to propose.
        lengths = [min(count, sequence.num_pending) for sequence, count in decided]
        for (sequence, _), verdict in zip(decided, verdicts(read, lengths), strict=True):
            self._apply(sequence, verdict.num_accepted, verdict.recovered, outcome)
        return {sequence for sequence, _ in windows}

    def _decisions(self, windows: list[Window], way: Way) -> Decisions:
        places = _places(windows)
        lengths = [count for _, count in windows]
        return self._decider.verify(places, self.drafted.tokens(places), lengths, way)

    def _apply(
        self, sequence: Sequence, num_accepted: int, recovered: int | None, outcome: Outcome
    ) -> None:
        offsets = outcome.stats.verified_by_offset
        num_decided = num_accepted + (recovered is not None)
        for offset, proposal in enumerate(sequence.tail[:num_decided]):
            is_accepted = offset < num_accepted
            offsets.append((proposal.proposer, offset, is_accepted))
            if proposal.proposer != LOOKUP:  # it learns from the text
                sequence.stats.verified[proposal.proposer] += 1
                outcome.verdicts.append((sequence, proposal.proposer, is_accepted))
        sequence.accept(num_accepted)
        if recovered is None:
            return
        if recovered == INVALID:
            self._fail(sequence, outcome)
            return
        sequence.recover(recovered)
        outcome.stats.num_recovered += 1
        if sequence.coin_base is not None:
            self._strategies.shared_coins.join(sequence)

    def _fail(self, sequence: Sequence, outcome: Outcome) -> None:
        """Its next position has no distribution: because of its models, or of what it allows."""
        outcome.failed.add(sequence)
        position = sequence.num_verified
        scorers = self._strategies.of(sequence).target(sequence, position).scorers
        rows = [self._scores.read(model, [(sequence, position)]) for model in scorers]
        if not all(bool(row.amax().isfinite()) for row in rows):
            outcome.untrusted.add(sequence)

    def _draw(self, sequences: Iterable[Sequence], outcome: Outcome) -> None:
        ready = [s for s in sequences if s not in outcome.failed and self._may_draw(s)]
        if not ready:
            return
        for way, group in grouped(ready, self._decider.way):
            places = [(sequence, len(sequence)) for sequence in group]
            tokens = self._decider.draw(places, way)
            outcome.has_read = True
            for sequence, token_id in zip(group, tokens.tolist(), strict=True):
                if token_id == INVALID:
                    self._fail(sequence, outcome)
                else:
                    sequence.draw(token_id)
                    outcome.stats.num_drawn += 1
            self._probes.look(sequence for sequence in group if sequence not in outcome.failed)
        # A sequence on shared coins may leave them here only, where its next coin is unknown.
        self._settle(ready, outcome)

    def _force(self, sequences: Iterable[Sequence], outcome: Outcome) -> None:
        healthy = (sequence for sequence in sequences if sequence not in outcome.failed)
        force(healthy, self._most_forced, outcome.num_forced)

    def _settle(self, sequences: Iterable[Sequence], outcome: Outcome) -> None:
        """Take up new choices where nothing is pending."""
        for sequence in sequences:
            if (
                sequence.num_pending == 0
                and sequence not in outcome.failed
                and self._strategies.settle(sequence)
            ):
                outcome.stats.chosen.append(sequence.schedule)

    def _propose(
        self, flight: Flight, sequences: Iterable[Sequence], verified: set[Sequence]
    ) -> None:
        model, outcome = flight.plan.model, flight.outcome
        ready = []
        for sequence in sequences:
            if sequence in outcome.failed or not self._may_propose(sequence, model):
                continue
            if forced_token(sequence) is None:
                ready.append(sequence)
            else:
                sequence.decline()  # once what is pending is verified, it takes no forward
        if not ready:
            return
        for sequence, token_id in self._choose(flight, ready):
            if token_id == INVALID:
                # It gives nothing to any token that the request allows; the target may.
                sequence.decline()
                continue
            follows_others = bool(sequence.tail) and sequence.tail[-1].proposer != model
            is_bonus = sequence in verified or follows_others
            is_short = self._proposes_short(flight, sequence)
            sequence.propose(token_id, Proposal(model, is_short, is_bonus))
            outcome.stats.num_proposed += 1
            outcome.stats.num_bonus += is_bonus

    def _choose(self, flight: Flight, sequences: list[Sequence]) -> Iterator[tuple[Sequence, int]]:
        """The token that the model proposes to each sequence, from its own distribution alone."""

        def key(sequence: Sequence) -> tuple[Way, bool, bool]:
            is_short = self._proposes_short(flight, sequence)
            is_ahead = self.runs_ahead and not is_short and not depends_on_tokens(sequence)
            return self._decider.way(sequence), is_short, is_ahead

        for (way, is_short, is_ahead), group in grouped(sequences, key):
            places = [(sequence, len(sequence)) for sequence in group]
            tokens = self._decider.propose(flight.plan.model, places, way, is_short)
            if is_ahead:
                ids = self.drafted.leave(places, tokens)
            else:
                ids = tokens.tolist()
                flight.outcome.has_read = True
            yield from zip(group, ids, strict=True)

    def _may_draw(self, sequence: Sequence) -> bool:
        return (
            not sequence.tail
            and not sequence.is_full
            and not sequence.scores_prompt
            and is_scored(self._strategies.of(sequence), sequence, len(sequence.token_ids))
        )

    def _may_propose(self, sequence: Sequence, model: int) -> bool:
        if sequence.num_seen[model] < len(sequence.token_ids):
            return False
        return self._strategies.of(sequence).may_propose(sequence, model)

    def _drafts_short(self, sequence: Sequence, model: int) -> bool:
        """Does `model` propose from its shortlist?

        Its full scores are computed anyway when its proposals are verified: the shortlist pays
        where several proposals are verified together. A mixture keeps all that model 0 proposes at
        its own positions if that is drawn from all of its distribution.
        """
        decoding = sequence.schedule
        return (
            self._scores.has_shortlist(model)
            and decoding.strategy in ("cos", "speculative")
            and decoding.gamma[model] >= _MIN_SHORTLIST_GAMMA
        )

    def _proposes_short(self, flight: Flight, sequence: Sequence) -> bool:
        """In this step: where the schedule has just changed, the forward left no states."""
        return sequence in flight.drafting and self._drafts_short(sequence, flight.plan.model)

    def _defers(self, sequence: Sequence, model: int) -> bool:
        return self._drafts_short(sequence, model) or any(
            proposal.from_shortlist for proposal in sequence.tail
        )

    def _report(self, before: dict[Sequence, int], outcome: Outcome) -> None:
        """Log-probabilities of newly verified tokens; their scores are still in the store."""
        spans = [
            (sequence, before[sequence], count)
            for sequence, count in outcome.num_new.items()
            if sequence.params.logprobs is not None
        ]
        if not spans:
            return
        try:
            self._report_together(spans, outcome)
        except Exception as error:
            logger.warning("log-probabilities are tried one by one: %r", error)
            for span in spans:
                with guarding(span[0], outcome):
                    self._report_together([span], outcome)

    def _report_together(self, spans: Row[Decided], outcome: Outcome) -> None:
        entries = self._logprobs.of_texts(spans)
        for (sequence, _, _), each in zip(spans, entries, strict=True):
            outcome.logprobs[sequence] = each


def _count(batch: Batch, decoding: list[Span], runner: ModelRunner, stats: StepStats) -> None:
    """Note how much work the forward is."""
    stats.num_tokens = batch.num_tokens
    stats.num_decoding = len(decoding)
    stats.num_past = sum(span.num_past for span in decoding)
    stats.num_attended = num_attended(decoding, runner.page_size, runner.gathers)


def _pairs(numbers: list[int]) -> list[list[int]]:
    return [numbers[i : i + 2] for i in range(0, len(numbers), 2)]


def _places(windows: list[Window]) -> list[Place]:
    return [(s, s.num_verified + offset) for s, count in windows for offset in range(count)]


def _num_prefill(sequence: Sequence, model: int, start: int, end: int) -> int:
    """How many of the tokens [start, end) are prompt or recomputation, not decoding."""
    return max(0, min(end, max(sequence.num_prompt, sequence.resume_at[model])) - start)

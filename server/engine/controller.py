"""Chooses strategy and proposal lengths under `auto`: the most verified tokens per second, now.

For each way of decoding that could be taken, `decoding.profile` says how often each model runs,
over how many tokens, for each verified token, given how often each model's proposals are accepted.
The cost table says what that takes on this machine with as many sequences as decode now. The steps
that a strategy then really takes beside its prediction (batches that split, say) are learnt too.

Anything but standard decoding has to promise more than standard decoding by a margin and by what is
uncertain of its seconds. What might pay and was not timed lately is tried for some steps; before
that, and every twenty or thirty seconds while something else is done, some rounds of standard
decoding are timed (`trials`).

Choices change between steps only, and a sequence takes one up only where none of its tokens is
pending (`Strategies.settle`). They depend on seconds, on counts, and on tokens that were decided or
dropped: where a proposal leaves a model nothing to propose that the request allows, the cycle is
shorter, and with it the seconds, even if the proposal is dropped behind a rejection.
None of the randomness behind these is used again: after a rejection everything is drawn anew
(`rng.round_seed`). So choices say nothing of tokens to come, and the law stays exact; seeded and
greedy texts are the same whatever is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Row

from server.core.sampling_params import DecodingParams
from server.core.sequence import Sequence
from server.core.stats import Delivery, StepStats
from server.decoding.strategies import Strategies, proposers
from server.engine.acceptance import AcceptanceRates
from server.engine.cost_table import CostTable
from server.engine.forced_rates import ForcedRates
from server.engine.groups import Division, Group, Groups
from server.engine.half_batches import HalfBatches
from server.engine.interval import Interval
from server.engine.kind import kind_of
from server.engine.lookup_costs import LookupCosts
from server.engine.predictor import MOST_UPSIDE, Predictor, Uncertainty
from server.engine.rates import Rates
from server.engine.reality import Reality
from server.engine.trials import MARGIN, Candidate

_PERIOD = 16  # steps between choices
_BATCH_PERIOD = 4  # steps that another batch has to last: while a text begins, one fewer decodes
_MOST_GROUPS = 4  # that choose between two steps: with dozens the rest wait for the next choice
_ALIKE = 0.8  # batches of as many sequences, times this or divided by it, at most
# Steps that a new choice takes until windows end at all times: at first they all begin together,
# and one that began is paid for before it gives tokens.
_MIXING_STEPS = 8
_HYSTERESIS = 1.03  # another way must promise so much more than the present one


class Controller:
    """Chooses for sequences whose decoding is `auto` in strategy or gamma; on the engine thread."""

    def __init__(
        self,
        costs: CostTable,
        strategies: Strategies,
        max_gamma: int,
        device_numbers: Row[int] = (),
        half_batches: bool | None = False,
    ) -> None:
        """One that knows nothing but `costs`; the others are those of HalfBatches."""
        self._costs = costs
        self._predictor = Predictor(costs, strategies)
        self._half_batches = HalfBatches(self._predictor, device_numbers, half_batches)
        self._groups = Groups(max_gamma)
        self._acceptance = AcceptanceRates()
        self._forced = ForcedRates()
        self._reality = Reality()
        self._interval = Interval()
        self._num_united = 0  # steps since all took up one choice
        self._batch = 1  # sequences that were decoding when something was chosen last
        self._num_unlike = 0  # steps since about as many were
        self._seconds = 0.0  # of decoding

    @property
    def halves(self) -> bool:
        """One half of the sequences is to go on beside the other."""
        return self._half_batches.is_on

    def choose(self, sequence: Sequence) -> DecodingParams:
        """How `sequence`, none of whose tokens is pending, is decoded from here on."""
        group = self._groups.of(sequence)
        if group.is_new:
            self._decide(group, [sequence])
        return group.chosen

    def add(self, sequence: Sequence, model: int, accepted: float) -> None:
        """A proposal of `model` was verified, or would have been, with this probability."""
        self._acceptance.add(sequence, model, accepted)

    def note_text(self, sequence: Sequence, delivery: Delivery) -> None:
        """A step has added this to the text of `sequence`."""
        self._forced.add(kind_of(sequence), delivery)

    def lookup_length(self, sequence: Sequence, rate: float, num_found: int) -> int:
        """How many of `num_found` guessed tokens are worth scoring."""
        costs = self._groups.of(sequence).lookup
        return 0 if costs is None else costs.best_length(rate, num_found)

    def observe(
        self, stats: StepStats, running: Row[Sequence], batch: int, is_last: bool = True
    ) -> None:
        """Learn from one step, `batch` sequences decoding; choose anew from time to time.

        `is_last`: sequences are as the step left them; else later steps, of which it is told next,
        have changed them since. Intervals do not end between such steps.
        """
        self._predictor.forget_seconds()
        self._seconds += stats.decode_seconds
        # Each half is decoded as if there were no other.
        together = -(-batch // 2) if self.halves else batch
        self._interval.add(stats, together, self._costs)
        if not is_last:
            return
        is_alike = _ALIKE <= together / self._batch <= 1 / _ALIKE
        self._num_unlike = 0 if is_alike else self._num_unlike + 1
        is_other = self._num_unlike >= _BATCH_PERIOD
        is_due = is_other or (is_alike and self._interval.num_steps >= _PERIOD)
        if self._interval.is_pure and not is_due:
            return
        division = self._groups.divide(running)
        if is_due:
            self._batch, self._num_unlike = max(1, together), 0
            self._end_interval(division, is_alike)
            self._look_at_halves(running, batch)
        # By what is chosen now, which may just have changed.
        is_united = division.is_united and not division.has_others
        self._num_united = self._num_united + 1 if is_united else 0
        self._interval.is_pure = self._num_united > _MIXING_STEPS

    def _end_interval(self, division: Division, is_alike: bool) -> None:
        """Learn from it and choose anew; `is_alike`: the batch is about what it was last time."""
        interval, self._interval = self._interval, Interval(begun_at=self._seconds)
        # Predictions are of what models propose.
        is_comparable = interval.is_pure and division.is_united and not interval.num_looked_up
        is_short = interval.total_tokens < 2 * division.num_members
        self._reality.forget(self._seconds - interval.begun_at)
        if is_comparable and not is_short:
            self._compare(interval, division)
        before = [group.chosen for group in division.members]
        for group in division.members:
            group.num_steps += interval.num_steps
            group.seconds += self._seconds - interval.begun_at
            if not is_alike:
                group.num_left = 0
        self._decide_all(division)
        is_kept = before == [group.chosen for group in division.members]
        if is_comparable and is_short and is_kept:
            # What ended before its windows did would be missing if it were dropped, and the rest
            # would seem faster than it is.
            self._interval.go_on_from(interval)

    def _compare(self, interval: Interval, division: Division) -> None:
        """Note the steps that an interval took, against those that were predicted for its tokens.

        Both are priced by the table: what the machine did meanwhile has no part in it.
        """
        [(group, members)] = division.members.items()
        group.note_rates(self._rates(members))
        predicted = sum(
            count * self._predictor.token_seconds(group.chosen, group.rates, max(1, batch))
            for batch, count in interval.num_tokens.items()
        )
        self._reality.add(
            group.chosen, interval.main_batch, interval.seconds, predicted / self._costs.slowness
        )

    def _decide_all(self, division: Division) -> None:
        """Choose for those that did so longest ago."""
        longest_first = sorted(division.members, key=lambda group: -group.num_steps)
        for group in longest_first[:_MOST_GROUPS]:
            self._decide(group, division.members[group])

    def _decide(self, group: Group, members: Row[Sequence]) -> None:
        """Choose for a group."""
        self._fade(group, members[0])
        group.note_rates(self._rates(members))
        seconds = {choice: self._token_seconds(group, choice) for choice in group.compared}
        group.note_compared(seconds)
        best = min(seconds, key=lambda choice: seconds[choice])
        if not group.is_new and seconds[group.chosen] <= seconds[best] * _HYSTERESIS:
            best = group.chosen
        if group.baseline is not None:
            best = self._weigh(group, best, group.baseline, seconds)
        group.take(best)
        self._price_lookup(group, seconds[best])

    def _fade(self, group: Group, sequence: Sequence) -> None:
        """Forget acceptance that nothing tests, neither proposals nor probes.

        Probes look at the scorers of what was drawn, which under cos is little, and not at all at a
        mixture, whose tokens one model decides alone.
        """
        tested = proposers(group.chosen)
        if group.chosen.strategy in ("standard", "speculative"):
            tested = tested.union(group.chosen.combination.scorers)
        idle = frozenset(range(sequence.num_models)) - tested
        self._acceptance.fade(sequence, idle, group.seconds)

    def _rates(self, members: Row[Sequence]) -> Rates:
        """Of sequences of one group, by what became of their proposals and of others like them."""
        acceptance = self._acceptance.mean(members)
        return Rates(acceptance, *self._forced.of(kind_of(members[0])))

    def _token_seconds(self, group: Group, choice: DecodingParams) -> float:
        """Of a verified token, as predicted and as such predictions have turned out."""
        seconds = self._predictor.token_seconds(choice, group.rates, self._batch)
        return seconds * self._reality.value(choice, self._batch)

    def _uncertainty(self, group: Group, choice: DecodingParams) -> Uncertainty:
        """Of the same."""
        return self._predictor.uncertainty(choice, group.rates, self._batch)

    def _weigh(
        self,
        group: Group,
        best: DecodingParams,
        baseline: DecodingParams,
        seconds: Mapping[DecodingParams, float],
    ) -> DecodingParams:
        """What to do of the two, or of what was not timed and may be faster than both."""
        speedups = {choice: seconds[baseline] / each for choice, each in seconds.items()}
        candidate = self._candidate(group, best, speedups)
        if candidate is None:
            return baseline
        doubt = self._uncertainty(group, baseline).doubt
        judgement = group.trials.proceed(candidate, doubt, group.num_steps, self._seconds)
        return candidate.choice if judgement.is_for_candidate else baseline

    def _candidate(
        self, group: Group, best: DecodingParams, speedups: Mapping[DecodingParams, float]
    ) -> Candidate | None:
        """The best, if it promises enough, or what was not timed and may; None if nothing does."""
        if speedups[best] >= MARGIN:
            return Candidate(best, speedups[best], self._uncertainty(group, best))
        candidates = (
            Candidate(choice, speedup, self._uncertainty(group, choice))
            for choice, speedup in speedups.items()
            if speedup * MOST_UPSIDE >= MARGIN
        )
        return group.trials.most_hopeful(candidates, group.chosen, self._seconds)

    def _price_lookup(self, group: Group, token_seconds: float) -> None:
        """Look up only what is scored faster than it is decoded by what was chosen."""
        lookup = group.chosen.lookup
        if lookup is not None:
            scorers = group.chosen.combination.scorers
            group.lookup = LookupCosts.at(
                self._costs, scorers, self._batch, lookup.max_tokens, token_seconds / MARGIN
            )

    def _look_at_halves(self, running: Row[Sequence], batch: int) -> None:
        """Do half-batches pay for how most of the sequences are decoded?"""
        if not self._half_batches.is_open or not running:
            return
        by_schedule: dict[DecodingParams, list[Sequence]] = {}
        for sequence in running:
            by_schedule.setdefault(sequence.schedule, []).append(sequence)
        schedule, members = max(by_schedule.items(), key=lambda item: len(item[1]))
        self._half_batches.look(schedule, self._rates(members), batch)

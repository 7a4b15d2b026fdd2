"""Chooses strategy and proposal lengths under `auto`: the most verified tokens per second, now.

For each way of decoding that could be taken, `decoding.profile` says how often each model runs,
over how many tokens, for each verified token, given how often each model's proposals are accepted.
The cost table says what that takes on this machine with as many sequences as decode now. The steps
that a strategy then really takes beside its prediction (batches that split, say) are learnt too.

Anything but standard decoding has to promise more than standard decoding by a margin and by what is
uncertain of its seconds. What might pay and was not timed lately is tried for some steps; before
that, and every twenty or thirty seconds while something else is done, some rounds of standard
decoding are timed, so that the two are compared with each other and not with a machine of another
time.

Choices change between steps only, and a sequence takes one up only where none of its tokens is
pending (`Strategies.settle`). They depend on seconds, on counts, and on tokens that were decided or
dropped: where a proposal leaves a model nothing to propose that the request allows, the cycle is
shorter, and with it the seconds, even if the proposal is dropped behind a rejection.
None of the randomness behind these is used again: after a rejection everything is drawn anew
(`rng.round_seed`). So choices say nothing of tokens to come, and the law stays exact; seeded and
greedy texts are the same whatever is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence as Row
from dataclasses import dataclass, field
from typing import Literal

from server.core.combination import Combination
from server.core.lookup import LOOKUP
from server.core.sampling_params import DecodingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.decoding.strategies import Strategies
from server.engine.acceptance import Acceptance
from server.engine.bounded import make_room
from server.engine.choices import make_choices
from server.engine.cost_table import CostTable
from server.engine.half_batches import HalfBatches
from server.engine.lookup_costs import LookupCosts
from server.engine.predictor import Predictor, differ
from server.engine.reality import Reality

_PERIOD = 16  # steps between choices
_BATCH_PERIOD = 4  # steps after which another batch is looked at
_MOST_GROUPS = 4  # that choose between two steps: with dozens the rest wait for the next choice
# Of all ways, only the best few are looked at each time, and all of them every so many times.
_SWEEP_PERIOD = 4
_NUM_NEAR = 8
_ALIKE = 0.8  # batches of as many sequences, times this or divided by it, at most
# Steps that a new choice takes until windows end at all times: at first they all begin together,
# and one that began is paid for before it gives tokens.
_MIXING_STEPS = 8
# Another way must promise this much more than the present one; and anything that proposes, this
# much more than standard decoding, what is uncertain of its seconds not counted: below it a wrong
# guess costs more than there is to gain.
_HYSTERESIS = 1.03
_MARGIN = 1.03
# Relative deviations of a way's seconds: above the first, standard decoding is timed before
# anything is compared with it that would not pay by more than what is uncertain of both, until they
# are below the second; there a way has been tried.
_STALE = 0.07
_TRIED = 0.045
_HOPE = 1.0  # deviations that a forward may be faster than timed, but not than one of one token
_TRIAL_STEPS = 48  # that a trial may last; what reads prompts all the time cannot be timed
_NO_TRIAL_SECONDS = 120.0  # of decoding, after one that could not
_UNTESTED = 120.0  # seconds of decoding after which 63 % of what nothing tests is forgotten

Kind = Literal["greedy", "seeded", "free"]


@dataclass(frozen=True, slots=True)
class _Uncertainty:
    """How well the seconds of a way of decoding are known.

    Attributes:
        doubt: their relative deviation.
        hope: they may turn out to be so many times fewer.
    """

    doubt: float = 0.0
    hope: float = 1.0


@dataclass(slots=True)
class _Trial:
    """Doing something to learn what it takes.

    Attributes:
        num_steps: for which it has been done.
        not_before: seconds of decoding until which it is not done again, where it taught nothing.
    """

    num_steps: int = 0
    not_before: float = 0.0


@dataclass(slots=True)
class _Group:
    """Sequences that ask for the same decoding and take their tokens the same way.

    Attributes:
        choices: what may be chosen, the plain way first.
        chosen: what is, now.
        near: the best of them, when all were looked at last, and the plain way first.
        num_left: decisions until all are looked at again.
        lookup: what prompt lookup takes beside it; None where it is off.
        rates: [num_models] mean acceptance as last looked at, or little else; None: never.
        trials: of what has been tried.
        is_stale: standard decoding is to be timed again.
        num_steps, seconds: of decoding with it, since it chose last.
    """

    choices: tuple[DecodingParams, ...]
    chosen: DecodingParams
    near: tuple[DecodingParams, ...] = ()
    num_left: int = 0
    is_new: bool = True
    lookup: LookupCosts | None = None
    rates: tuple[float, ...] | None = None
    trials: dict[DecodingParams, _Trial] = field(default_factory=dict)
    is_stale: bool = False
    num_steps: int = 0
    seconds: float = 0.0

    def trial(self, choice: DecodingParams) -> _Trial:
        return self.trials.setdefault(choice, _Trial())


@dataclass(slots=True)
class _Interval:
    """Steps since the last choice: what they gave, and what they took.

    Attributes:
        is_pure: all have taken up the choice some steps ago; nothing is counted before but steps.
        seconds: expected of these very steps by the cost table, on a machine as fast as at first.
        num_tokens: by how many sequences were decoding.
        begun_at: seconds of decoding.
    """

    is_pure: bool = False
    num_steps: int = 0
    seconds: float = 0.0
    begun_at: float = 0.0
    num_tokens: dict[int, int] = field(default_factory=dict)
    num_looked_up: int = 0


class Controller:
    """Chooses for sequences whose decoding is `auto` in strategy or gamma; on the engine thread."""

    def __init__(
        self,
        costs: CostTable,
        strategies: Strategies,
        max_gamma: int,
        places: Row[int] = (),
        half_batches: bool | None = False,
    ) -> None:
        """One that knows nothing but `costs`; `places` and `half_batches` as in HalfBatches."""
        self._costs = costs
        self._predictor = Predictor(costs, strategies)
        self._half_batches = HalfBatches(self._predictor, places, half_batches)
        self._max_gamma = max_gamma
        self._groups: dict[tuple[DecodingParams, Kind], _Group] = {}
        # The same by the identity of parameters, which are kept with it: hashing them takes longer.
        self._groups_by_id: dict[tuple[int, Kind], tuple[DecodingParams, _Group]] = {}
        self._acceptance: dict[tuple[Combination, Kind], Acceptance] = {}
        self._reality = Reality()
        self._interval = _Interval()
        self._num_followed = 0  # steps since all took up the choice
        self._batch = 1
        self._seconds = 0.0

    @property
    def halves(self) -> bool:
        """One half of the sequences is to go on beside the other."""
        return self._half_batches.is_on

    def choose(self, sequence: Sequence) -> DecodingParams:
        """How `sequence`, none of whose tokens is pending, is decoded from here on."""
        group = self._group(sequence)
        if group.is_new:
            self._decide(group, [sequence])
        return group.chosen

    def add(self, sequence: Sequence, model: int, accepted: float) -> None:
        """A proposal of `model` was verified, or would have been, with this probability."""
        self._of(sequence.decoding.combination, sequence).add(model, accepted)

    def lookup_length(self, sequence: Sequence, rate: float, num_found: int) -> int:
        """How many of `num_found` guessed tokens are worth scoring."""
        costs = self._group(sequence).lookup
        return 0 if costs is None else costs.best_length(rate, num_found)

    def observe(
        self, stats: StepStats, running: Row[Sequence], batch: int, is_last: bool = True
    ) -> None:
        """Learn from one step, `batch` sequences decoding; choose anew from time to time.

        `is_last`: sequences are as the step left them; else later steps, of which it is told next,
        have changed them since. Intervals do not end between such steps.
        """
        self._predictor.forget_seconds()
        num_decoding = batch
        if self.halves:
            batch = -(-batch // 2)  # each half is decoded as if there were no other
        self._add_to_interval(stats, batch)
        if not is_last:
            return
        num_steps = self._interval.num_steps
        is_alike = _ALIKE <= batch / self._batch <= 1 / _ALIKE
        is_due = num_steps >= (_PERIOD if is_alike else _BATCH_PERIOD)
        if self._interval.is_pure and not is_due:
            return
        groups, members, is_alone = self._grouped(running)
        if is_due:
            self._batch = max(1, batch)
            self._end_interval(groups, members, is_alike)
            self._look_at_halves(running, num_decoding)
        is_alone &= len(groups) == 1
        is_alone &= all(_follow(group, members[key]) for key, group in groups.items())
        self._num_followed = self._num_followed + 1 if is_alone else 0
        self._interval.is_pure = self._num_followed > _MIXING_STEPS

    def _add_to_interval(self, stats: StepStats, batch: int) -> None:
        interval = self._interval
        interval.num_steps += 1
        # Proposed, or decided, which for the last ones of an interval is left to the next.
        decided = sum(proposer == LOOKUP for proposer, _, _ in stats.verified_by_offset)
        interval.num_looked_up += stats.num_looked_up + decided
        self._seconds += stats.decode_seconds
        if interval.is_pure:
            interval.seconds += self._costs.price(stats) / self._costs.slowness
            count = sum(delivery.num_decoded for delivery in stats.deliveries)
            interval.num_tokens[batch] = interval.num_tokens.get(batch, 0) + count

    def _end_interval(
        self, groups: dict[int, _Group], members: dict[int, list[Sequence]], is_alike: bool
    ) -> None:
        """Learn from it and choose anew; `is_alike`: the batch is about what it was then."""
        interval, self._interval = self._interval, _Interval(begun_at=self._seconds)
        before = [group.chosen for group in groups.values()]
        is_left = len(groups) == 1 and self._compare(
            interval, next(iter(groups.values())), next(iter(members.values()))
        )
        for group in groups.values():
            group.num_left *= is_alike
            group.num_steps += interval.num_steps
            group.seconds += self._seconds - interval.begun_at
        self._decide_all(groups, members)
        if before != [group.chosen for group in groups.values()]:
            self._num_followed = 0
        elif is_left:
            self._interval.seconds = interval.seconds
            self._interval.num_tokens = interval.num_tokens

    def _grouped(
        self, running: Iterable[Sequence]
    ) -> tuple[dict[int, _Group], dict[int, list[Sequence]], bool]:
        """Groups and their sequences, by key, and whether there are no others.

        Else others' steps and tokens would count as the group's.
        """
        groups: dict[int, _Group] = {}
        members: dict[int, list[Sequence]] = {}
        is_alone = True
        for sequence in running:
            if sequence.is_resuming:
                continue
            if not sequence.decoding.is_auto:
                is_alone = False
            else:
                group = self._group(sequence)
                groups[id(group)] = group
                members.setdefault(id(group), []).append(sequence)
        return groups, members, is_alone

    def _compare(self, interval: _Interval, group: _Group, members: list[Sequence]) -> bool:
        """The steps that an interval took, against those that were predicted for its tokens.

        Both are priced by the table: what the machine did meanwhile has no part in it. Returns
        whether there are too few tokens yet: the next interval then goes on with this one, for
        what ended before its windows did would be missing if it were dropped, and the rest would
        seem faster than it is.
        """
        chosen = group.chosen
        num_tokens = sum(interval.num_tokens.values())
        # Predictions are of what models propose.
        is_pure = interval.is_pure and _follow(group, members) and not interval.num_looked_up
        if not is_pure:
            return False
        if num_tokens < 2 * len(members):
            return True
        self._reality.forget(interval.seconds)
        rates = self._rates(group, members)
        predicted = sum(
            count * self._predictor.token_seconds(chosen, rates, max(1, batch))
            for batch, count in interval.num_tokens.items()
        )
        batch = max(interval.num_tokens, key=lambda size: interval.num_tokens[size])
        self._reality.add(chosen, batch, interval.seconds, predicted / self._costs.slowness)
        return False

    def _fade(self, group: _Group, sequence: Sequence, seconds: float) -> None:
        """Forget acceptance that nothing tests: standard decoding never runs who does not score.

        A bad spell of its proposals would otherwise be remembered for good.
        """
        combination = group.chosen.combination
        if group.chosen.strategy == "standard":
            for model in set(range(len(combination.weights))) - set(combination.scorers):
                self._of(combination, sequence).forget(model, -math.expm1(-seconds / _UNTESTED))

    def _decide(self, group: _Group, members: Row[Sequence]) -> None:
        """Choose for a group."""
        self._fade(group, members[0], group.seconds)
        num_steps, group.num_steps, group.seconds = group.num_steps, 0, 0.0
        rates = self._rates(group, members)
        seconds = self._seconds_of(group, rates)
        best = min(seconds, key=lambda choice: seconds[choice])
        if not group.is_new and seconds[group.chosen] <= seconds[best] * _HYSTERESIS:
            best = group.chosen
        plain = group.choices[0]
        if plain.strategy == "standard":
            gains = {choice: seconds[plain] / seconds[choice] for choice in seconds}
            if gains[best] < _MARGIN:
                best = self._most_hopeful(group, gains, rates)
            group.trial(best).num_steps += num_steps
            doubt = self._uncertainty(plain, rates).doubt
            if not self._pays(group, best, gains[best], doubt, self._uncertainty(best, rates)):
                best = plain
        group.chosen = best
        group.is_new = False
        if (lookup := group.chosen.lookup) is not None:
            scorers = group.chosen.combination.scorers
            without = seconds[group.chosen] / _MARGIN
            group.lookup = LookupCosts.at(
                self._costs, scorers, self._batch, lookup.max_tokens, without
            )

    def _decide_all(self, groups: dict[int, _Group], members: dict[int, list[Sequence]]) -> None:
        """Choose for those that did so longest ago."""
        longest_first = sorted(groups, key=lambda key: -groups[key].num_steps)
        for key in longest_first[:_MOST_GROUPS]:
            self._decide(groups[key], members[key])

    def _look_at_halves(self, running: Row[Sequence], batch: int) -> None:
        """Do half-batches pay for how most of the sequences are decoded?"""
        if not self._half_batches.is_open or not running:
            return
        by_schedule: dict[DecodingParams, list[Sequence]] = {}
        for sequence in running:
            by_schedule.setdefault(sequence.schedule, []).append(sequence)
        schedule, members = max(by_schedule.items(), key=lambda item: len(item[1]))
        self._half_batches.look(schedule, self._mean_rates(members), batch)

    def _seconds_of(self, group: _Group, rates: tuple[float, ...]) -> dict[DecodingParams, float]:
        """Of a verified token, by choice: of all, or of those that were best lately."""
        is_sweep = group.num_left == 0
        choices = group.choices if is_sweep else (*group.near, group.chosen)
        seconds = {choice: self._expected(choice, rates) for choice in choices}
        if is_sweep:
            best = sorted(group.choices[1:], key=lambda choice: seconds[choice])[:_NUM_NEAR]
            group.near = (group.choices[0], *best)
        group.num_left = (_SWEEP_PERIOD if is_sweep else group.num_left) - 1
        return seconds

    def _pays(
        self,
        group: _Group,
        choice: DecodingParams,
        gain: float,
        plain_doubt: float,
        uncertain: _Uncertainty,
    ) -> bool:
        """Is `choice`, which promises `gain`, to be done? Where nobody knows, it is tried."""
        trial, doubt = group.trial(choice), uncertain.doubt
        if gain * uncertain.hope < _MARGIN:
            trial.num_steps = 0  # it was learnt that it does not pay
            return False
        if trial.num_steps > _TRIAL_STEPS:
            trial.not_before = self._seconds + _NO_TRIAL_SECONDS
        is_sure = gain * (1 - doubt) >= _MARGIN
        if self._seconds < trial.not_before:
            trial.num_steps = 0
            return is_sure
        group.is_stale = plain_doubt > (_TRIED if group.is_stale else _STALE)
        if group.is_stale and gain * (1 - doubt - plain_doubt) < _MARGIN:
            return False
        if is_sure or doubt <= _TRIED:
            trial.num_steps = 0
            return is_sure or gain >= _MARGIN
        return True

    def _most_hopeful(
        self, group: _Group, gains: Mapping[DecodingParams, float], rates: tuple[float, ...]
    ) -> DecodingParams:
        """Of what has not been tried what may pay most, one that is being tried first; or plain."""
        plain = group.choices[0]
        hopes: dict[DecodingParams, float] = {}
        for choice, gain in gains.items():
            uncertain = self._uncertainty(choice, rates)
            hope = gain * uncertain.hope
            is_open = choice != plain and self._seconds >= group.trial(choice).not_before
            if is_open and uncertain.doubt > _TRIED and hope >= _MARGIN:
                hopes[choice] = hope
        if group.chosen in hopes:
            return group.chosen
        return max(hopes, key=lambda choice: hopes[choice], default=plain)

    def _uncertainty(self, choice: DecodingParams, rates: tuple[float, ...]) -> _Uncertainty:
        """Of the seconds of its forwards, those of standard decoding being known."""
        if choice.strategy == "mixture":
            return _Uncertainty()
        costs, batch = self._costs, self._batch
        total = doubtful = least = 0.0
        profile = self._predictor.profile(choice, rates)
        for shape, rate in profile.rates.items():
            together = profile.num_together(shape.model, batch)
            rate *= batch / together
            doubt = costs.doubt(shape.model, together, shape.num_tokens)
            seconds = costs.forward_seconds(shape.model, together, shape.num_tokens)
            floor = min(seconds, costs.forward_seconds(shape.model, together, 1))
            total += rate * seconds
            doubtful += rate * seconds * doubt
            least += rate * max(floor, seconds * (1 - _HOPE * doubt))
        return _Uncertainty(doubtful / total, total / least)

    def _expected(self, choice: DecodingParams, rates: tuple[float, ...]) -> float:
        seconds = self._predictor.token_seconds(choice, rates, self._batch)
        return seconds * self._reality.value(choice, self._batch)

    def _rates(self, group: _Group, members: Row[Sequence]) -> tuple[float, ...]:
        """[num_models] mean acceptance over the sequences at hand."""
        rates = self._mean_rates(members)
        # What moves by less than a bucket's width would only go to and fro between profiles.
        if group.rates is None or differ(rates, group.rates):
            group.rates = rates
        return group.rates

    def _mean_rates(self, members: Row[Sequence]) -> tuple[float, ...]:
        """Members ask for the same combination."""
        acceptance = self._of(members[0].decoding.combination, members[0])
        return tuple(
            sum(acceptance.rate_of(sequence, model) for sequence in members) / len(members)
            for model in range(members[0].num_models)
        )

    def _group(self, sequence: Sequence) -> _Group:
        decoding, kind = sequence.decoding, _kind(sequence)
        known = self._groups_by_id.get((id(decoding), kind))
        if known is not None:
            return known[1]
        if (decoding, kind) not in self._groups:
            make_room(self._groups)
            choices = make_choices(decoding, self._max_gamma)
            self._groups[decoding, kind] = _Group(choices, choices[0])
        group = self._groups[decoding, kind]
        make_room(self._groups_by_id)
        self._groups_by_id[id(decoding), kind] = decoding, group
        return group

    def _of(self, combination: Combination, sequence: Sequence) -> Acceptance:
        key = (combination, _kind(sequence))
        if key not in self._acceptance:
            make_room(self._acceptance)
            self._acceptance[key] = Acceptance(sequence.num_models)
        return self._acceptance[key]


def _follow(group: _Group, members: Row[Sequence]) -> bool:
    """All have taken up what was chosen."""
    return all(sequence.schedule == group.chosen for sequence in members)


def _kind(sequence: Sequence) -> Kind:
    if sequence.params.is_greedy:
        return "greedy"
    return "seeded" if sequence.params.is_seeded else "free"

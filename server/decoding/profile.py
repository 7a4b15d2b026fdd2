"""What a strategy does per token, worked out from the strategy itself.

A strategy is a function of counters, so decoding one sequence is a walk over few states: how much
of the tail is whose, and how far behind each model is. Given how probably each proposer's tokens
are accepted, this is a Markov chain; its stationary distribution says how often each model runs,
over how many tokens, for each token verified. `engine.controller` multiplies that by seconds.

Where texts follow grammars, some tokens are followed by *runs* of forced ones (`engine.forcing`).
These end drafts, and nothing is drawn or proposed right after the window before them: it is they
that follow. Tokens are those that are not forced, unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch

from server.core.proposal import Proposal
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.decoding.strategies import Strategy, is_scored, num_verifiable
from server.decoding.turns import next_model

_LENGTH = 64  # of the imagined text; nothing depends on it
# Where runs would make more states than can be solved for in passing they are left out; of more
# models than so many without counting the states, which takes time, too.
_MOST_STATES, _MOST_MODELS = 400, 3
_SETTLING_STEPS, _COUNTED_STEPS = 24, 48  # of the imagined batch
_EDGE = 0.01  # acceptance is taken to lie this far from 0 and 1, where chains fall apart


class StepShape(NamedTuple):
    """One advance of one sequence: what the model feeds, and what is decided then."""

    model: int
    num_tokens: int
    num_drawn: int
    num_verified: int
    num_proposed: int


@dataclass(frozen=True, eq=False)
class Profile:
    """Mean of one verified token.

    Attributes:
        rates: advances of each shape.
        num_forced: forced tokens that are among those fed: one for each run that follows a window.
        walk: gives `shares`, after some time.
        shares: of the sequences of a large batch, by model, those that take part in its forwards on
            average: not all come to want it at the same time.
    """

    rates: dict[StepShape, float]
    num_forced: float
    walk: Callable[[], dict[int, float]]

    @cached_property
    def shares(self) -> dict[int, float]:
        return self.walk()

    @cached_property
    def forwards(self) -> dict[int, float]:
        """Advances of each model."""
        found: dict[int, float] = {}
        for shape, rate in self.rates.items():
            found[shape.model] = found.get(shape.model, 0.0) + rate
        return found

    def num_together(self, model: int, batch: float) -> float:
        """Sequences in a forward of `model`, of `batch` that decode; on average, at least one."""
        if batch <= 1:
            return 1.0
        return max(1.0, self.shares.get(model, 1.0) * batch)


class _State(NamedTuple):
    """A sequence, as far as its strategy can tell."""

    proposers: tuple[int, ...]
    behind: tuple[int, ...]  # tokens that each model has not seen
    is_closed: bool = False  # what follows the tail is forced


@dataclass(frozen=True, slots=True)
class _Branch:
    """One outcome of an advance: these proposers' tokens are accepted, then perhaps one is not.

    Attributes:
        runs_on: what follows turned out to be forced, or not; None where that was known, or is not.
        num_forced: tokens that were taken so.
    """

    accepted: tuple[int, ...]
    rejected: int | None
    runs_on: bool | None
    num_forced: int
    shape: StepShape
    target: int  # index of the state that follows
    num_verified: int


class Chain:
    """All states that one strategy reaches for one sequence, and what leads where.

    Attributes:
        proposers: models whose proposals are verified; profiles depend on no other's acceptance.
    """

    def __init__(
        self, decoding: DecodingParams, strategy: Strategy, has_forced: bool = False
    ) -> None:
        """States of one sequence.

        Args:
            decoding: how it is decoded.
            strategy: of `decoding`; it decides by counters alone (not a mixture).
            has_forced: its text has runs; these are left out where there would be too many states.
        """
        self._decoding = decoding
        self._strategy = strategy
        self._num_models = len(decoding.combination.weights)
        opener = next((model for model, length in enumerate(decoding.gamma) if length), 0)
        self._running = {0, opener, *decoding.combination.scorers}
        self._has_forced = has_forced and self._num_models <= _MOST_MODELS
        self._index: dict[_State, int] = {}
        self._branches: list[list[_Branch]] = []
        if not self._explore(_MOST_STATES if self._has_forced else math.inf):
            self._has_forced = False
            self._explore(math.inf)
        self.proposers = frozenset(
            proposer
            for branches in self._branches
            for branch in branches
            for proposer in (*branch.accepted, branch.rejected)
            if proposer is not None
        )

    def _explore(self, most_states: float) -> bool:
        """Fill in all states and branches; False where there are more states than so many."""
        start = _State((), (1,) * self._num_models)
        self._index, self._branches = {start: 0}, []
        states = [start]
        while len(self._branches) < len(states) <= most_states:
            self._branches.append(self._expand(states[len(self._branches)], states))
        return len(states) <= most_states

    def profile(self, acceptance: tuple[float, ...], runs: float = 0.0) -> Profile:
        """At these rates.

        Args:
            acceptance: [num_models] probability that a model's proposal is accepted.
            runs: that a token is followed by a run of forced ones.
        """
        acceptance, runs = tuple(map(_inner, acceptance)), _inner(runs)
        odds = [
            [_probability(branch, acceptance, runs) for branch in branches]
            for branches in self._branches
        ]
        rates: dict[StepShape, float] = {}
        num_tokens = num_forced = 0.0
        for mass, branches, chances in zip(self._masses(odds), self._branches, odds, strict=True):
            for branch, chance in zip(branches, chances, strict=True):
                weight = mass * chance
                rates[branch.shape] = rates.get(branch.shape, 0.0) + weight
                num_tokens += weight * branch.num_verified
                num_forced += weight * branch.num_forced
        scaled = {shape: rate / num_tokens for shape, rate in rates.items()}
        return Profile(scaled, num_forced / num_tokens, partial(self._shares, odds))

    def _masses(self, odds: list[list[float]]) -> list[float]:
        """The stationary distribution over states, given the odds of each one's branches."""
        size = len(self._branches)
        system = [[0.0] * size for _ in range(size)]
        for state, (branches, chances) in enumerate(zip(self._branches, odds, strict=True)):
            system[state][state] -= 1.0
            for branch, chance in zip(branches, chances, strict=True):
                system[branch.target][state] += chance
        # pi = flow pi, with the last equation replaced by sum(pi) = 1.
        system[-1] = [1.0] * size
        right = torch.zeros(size, dtype=torch.float64)
        right[-1] = 1.0
        masses: list[float] = torch.linalg.solve(
            torch.tensor(system, dtype=torch.float64), right
        ).tolist()
        return masses

    def _shares(self, odds: list[list[float]]) -> dict[int, float]:
        """See `Profile.shares`; a batch so large that shares of it take the branches' odds."""
        moves = [
            [(branch.target, chance) for branch, chance in zip(branches, chances, strict=True)]
            for branches, chances in zip(self._branches, odds, strict=True)
        ]
        wanting: dict[int, list[int]] = {}  # states by the model that they want
        for state, branches in enumerate(self._branches):
            wanting.setdefault(branches[0].shape.model, []).append(state)
        masses = [1.0] + [0.0] * (len(moves) - 1)
        seen: dict[int, list[float]] = {}
        for step in range(_SETTLING_STEPS + _COUNTED_STEPS):
            wanted = {model: sum([masses[s] for s in states]) for model, states in wanting.items()}
            turn = next_model({model: mass for model, mass in wanted.items() if mass > 0})
            if step >= _SETTLING_STEPS:
                seen.setdefault(turn, []).append(wanted[turn])
            moving = [(state, masses[state]) for state in wanting[turn] if masses[state] > 0]
            for state, _ in moving:
                masses[state] = 0.0
            for state, mass in moving:
                for target, chance in moves[state]:
                    masses[target] += mass * chance
        return {model: sum(shares) / len(shares) for model, shares in seen.items()}

    def _expand(self, state: _State, states: list[_State]) -> list[_Branch]:
        """Advance the model that the strategy wants, for every outcome of verification."""
        sequence = self._sequence(state)
        model = self._strategy.next_model(sequence)
        sequence.num_seen[model] = len(sequence)
        num_decided = num_verifiable(self._strategy, sequence)
        return [
            self._outcome(state, model, num_accepted, runs_on, states)
            for num_accepted in range(num_decided + 1)
            for runs_on in self._questions(state, model, num_decided, num_accepted)
        ]

    def _questions(
        self, state: _State, model: int, num_decided: int, num_accepted: int
    ) -> tuple[bool | None, ...]:
        """Outcomes that differ by whether what follows is forced, where that is asked now.

        It is where all that was pending is accepted, and where a model may go on with the tail.
        """
        if not self._has_forced or num_accepted < num_decided:
            return (None,)
        sequence = self._sequence(state)
        sequence.num_seen[model] = len(sequence)
        sequence.accept(num_accepted)
        if num_decided and not sequence.tail:
            return (None,) if state.is_closed else (True, False)
        return (True, False) if sequence.tail and self._may_propose(sequence, model) else (None,)

    def _outcome(
        self,
        state: _State,
        model: int,
        num_accepted: int,
        runs_on: bool | None,
        states: list[_State],
    ) -> _Branch:
        """The branch where `model` advances, so many tokens are accepted and what follows is so."""
        sequence = self._sequence(state)
        num_tokens = sequence.num_unseen(model)
        assert num_tokens > 0
        sequence.num_seen[model] = len(sequence)
        num_decided = num_verifiable(self._strategy, sequence)
        window = _proposers(sequence)[:num_decided]
        is_rejected = num_accepted < num_decided
        num_verified = num_accepted + is_rejected
        sequence.accept(num_accepted)
        if is_rejected:
            sequence.recover(0)
        num_drawn = num_proposed = num_forced = 0
        ends_window = num_decided > 0 and not is_rejected and not sequence.tail
        if ends_window and (runs_on or state.is_closed):
            sequence.force(0)
            num_forced = 1
        elif not sequence.tail and is_scored(self._strategy, sequence, len(sequence)):
            sequence.draw(0)
            num_drawn = 1
            num_verified += 1
        if self._may_propose(sequence, model):
            if runs_on:
                sequence.decline()
            else:
                sequence.propose(0, Proposal(model))
                num_proposed = 1
        most = max(self._decoding.gamma) + self._num_models
        # A model that neither scores nor opens never runs: how far it is behind tells nothing.
        behind = tuple(
            min(most, len(sequence) - seen) if model in self._running else 1
            for model, seen in enumerate(sequence.num_seen)
        )
        is_closed = bool(sequence.tail) and sequence.is_closed
        after = _State(_proposers(sequence), behind, is_closed)
        if after not in self._index:
            self._index[after] = len(states)
            states.append(after)
        return _Branch(
            accepted=window[:num_accepted],
            rejected=window[num_accepted] if is_rejected else None,
            runs_on=runs_on,
            num_forced=num_forced,
            shape=StepShape(model, num_tokens, num_drawn, num_decided, num_proposed),
            target=self._index[after],
            num_verified=num_verified,
        )

    def _may_propose(self, sequence: Sequence, model: int) -> bool:
        has_read = sequence.num_seen[model] == len(sequence)
        return has_read and self._strategy.may_propose(sequence, model)

    def _sequence(self, state: _State) -> Sequence:
        """The state as a sequence of `_LENGTH` tokens and a tail."""
        params = SamplingParams(max_tokens=1 << 20)
        sequence = Sequence.start("chain", [0] * _LENGTH, params, self._decoding)
        for proposer in state.proposers:
            sequence.propose(0, Proposal(proposer))
        sequence.num_seen = [len(sequence) - behind for behind in state.behind]
        if state.is_closed:
            sequence.decline()
        return sequence


def _proposers(sequence: Sequence) -> tuple[int, ...]:
    return tuple(proposal.proposer for proposal in sequence.tail)


def _inner(rate: float) -> float:
    return min(1 - _EDGE, max(_EDGE, rate))


def _probability(branch: _Branch, acceptance: tuple[float, ...], runs: float) -> float:
    probability = 1.0 if branch.runs_on is None else runs if branch.runs_on else 1 - runs
    for proposer in branch.accepted:
        probability *= acceptance[proposer]
    return (
        probability if branch.rejected is None else probability * (1 - acceptance[branch.rejected])
    )

"""Strategies: which model advances next, what a position's target is, may a model propose.

They are pure functions of a sequence's counters (and of coins that are fixed before the tokens
they decide), so a sequence's schedule does not depend on its batch or on preemption.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams
from server.core.sequence import Sequence
from server.decoding.rng import Purpose, uniform

_MAX_LEAD = 2  # coins; who is further ahead of somebody does not wait for it
_MAX_KEPT = 1024  # strategies: clients may ask for any


class Strategy(Protocol):
    """Asked about sequences that are not resuming; see `engine.advance`."""

    def next_model(self, sequence: Sequence) -> int:
        """The model that should advance next; it has unseen tokens."""
        ...

    def target(self, sequence: Sequence, position: int) -> Combination:
        """The combination that decides `position`; its scorers are the models it needs."""
        ...

    def may_propose(self, sequence: Sequence, model: int) -> bool:
        """Whether `model`, having seen everything, proposes the next token."""
        ...


def furthest_behind(sequence: Sequence, scorers: tuple[int, ...]) -> int:
    """The scorer that has seen least; the earliest in proposal order among equals."""
    return min(scorers, key=sequence.num_seen.__getitem__)  # the first of equals


def is_scored(strategy: Strategy, sequence: Sequence, position: int) -> bool:
    """Whether all models that `position` needs have scored it."""
    scorers = strategy.target(sequence, position).scorers
    return min(map(sequence.num_seen.__getitem__, scorers)) >= position


def num_verifiable(strategy: Strategy, sequence: Sequence) -> int:
    """Pending tokens, in order, whose scorers have all scored them."""
    start, end = sequence.num_verified, len(sequence.token_ids)
    position = start
    while position < end and is_scored(strategy, sequence, position):
        position += 1
    return position - start


class Standard:
    """All scorers, one token each, then one token drawn from r: the baseline.

    `single` is this with a combination of one model.
    """

    def __init__(self, decoding: DecodingParams) -> None:
        self._combination = decoding.combination

    def next_model(self, sequence: Sequence) -> int:
        return furthest_behind(sequence, self._combination.scorers)

    def target(self, sequence: Sequence, position: int) -> Combination:
        return self._combination

    def may_propose(self, sequence: Sequence, model: int) -> bool:
        return False


class Speculative(Standard):
    """Model 0 proposes gamma[0] tokens, then the others score them (the paper's naive CoS)."""

    def __init__(self, decoding: DecodingParams) -> None:
        super().__init__(decoding)
        self._gamma = decoding.gamma[0]

    def next_model(self, sequence: Sequence) -> int:
        # Having gone over to this from another strategy, it may have seen everything already.
        if self.may_propose(sequence, 0) and sequence.num_unseen(0):
            return 0
        return furthest_behind(sequence, self._combination.scorers)

    def may_propose(self, sequence: Sequence, model: int) -> bool:
        return model == 0 and sequence.num_pending < self._gamma and not sequence.is_closed


class Cos(Standard):
    """Roles alternate (paper Alg. 1 and 2, any number of models).

    The first model that proposes opens with gamma[k] proposals, then whichever scorer is furthest
    behind scores them and adds a bonus token of its own. If that leaves nothing else pending, the
    bonus opens a proposal of gamma[k] tokens by that model; after a rejection the first one opens
    again. A model with gamma 0 only scores.
    """

    def __init__(self, decoding: DecodingParams) -> None:
        super().__init__(decoding)
        self._gamma = decoding.gamma
        self._max_pending = max(decoding.gamma) + len(decoding.gamma) - 1
        self._opener = next(model for model, length in enumerate(decoding.gamma) if length)

    def next_model(self, sequence: Sequence) -> int:
        opener = sequence.tail[-1].proposer if sequence.tail else self._opener
        if (
            self._continues(sequence, opener)
            and not sequence.is_closed
            and sequence.num_unseen(opener)
        ):
            return opener
        return furthest_behind(sequence, self._combination.scorers)

    def may_propose(self, sequence: Sequence, model: int) -> bool:
        tail = sequence.tail
        if not self._gamma[model] or len(tail) >= self._max_pending or sequence.is_closed:
            return False
        is_bonus = not tail or tail[-1].proposer != model
        return is_bonus or self._continues(sequence, model)

    def _continues(self, sequence: Sequence, model: int) -> bool:
        """The whole tail is `model`'s own and shorter than its gamma."""
        if len(sequence.tail) >= self._gamma[model]:
            return False
        return all(proposal.proposer == model for proposal in sequence.tail)


class SharedCoins:
    """One stream of coins for all sequences that take them (mixture with shared coins).

    All sequences on the stream then want the same model at the same time. The law of each stays
    exact because a sequence only ever moves on to the next coin, or, after a rejection and when it
    joins, to the first coin that nobody has looked at yet: a coin is never chosen by its value.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._num_revealed = 0

    def join(self, sequence: Sequence) -> None:
        """Align the next position of `sequence` with the first coin that nobody has seen."""
        sequence.coin_base = self._num_revealed - len(sequence)

    def is_fresh(self, sequence: Sequence) -> bool:
        """Nobody has looked at the coin of the next position of `sequence`."""
        assert sequence.coin_base is not None
        return len(sequence) + sequence.coin_base >= self._num_revealed

    def ahead(self, sequences: Iterable[Sequence]) -> set[Sequence]:
        """Those that others will come level with if they wait for a step or two.

        Who joined while others knew their next coin is ahead of them. It uses no other coins for
        waiting, and then wants the same model at the same time.
        """
        places = {
            s: len(s) + s.coin_base
            for s in sequences
            if s.coin_base is not None
            and s.schedule.kappa == 0
            and s.num_generated
            and not s.is_resuming
        }
        taken = set(places.values())
        return {s for s, at in places.items() if not taken.isdisjoint(range(at - _MAX_LEAD, at))}

    def coin(self, index: int) -> float:
        self._num_revealed = max(self._num_revealed, index + 1)
        return uniform(self._seed, index, Purpose.COIN)


class Mixture:
    """Weighted ensembles as mixtures: a coin per position names the model that decides it alone.

    kappa = 0 is the mixture of Fu et al. 2026 (arXiv 2605.00419): the coin's model draws. With
    kappa > 0, model 0 drafts on through up to kappa positions whose coin names another model; that
    model verifies them when it is its turn anyway, and draws the next position with its own coin.
    Model 0's own positions are accepted: their target is what they were drawn from, but where
    truncation keeps more tokens than are proposed from (`decoding.warp`).
    """

    def __init__(self, decoding: DecodingParams, coins: SharedCoins) -> None:
        weights = decoding.combination.weights
        num_models = len(weights)
        self._only = [Combination.only(num_models, model) for model in range(num_models)]
        self._cumulative = list(accumulate(weights))
        self._kappa = decoding.kappa
        self._max_pending = max(decoding.gamma)
        self._coins = coins

    def next_model(self, sequence: Sequence) -> int:
        if self._drafts(sequence):
            return 0
        if sequence.num_pending:
            return self._first_unscored(sequence)
        return self._coin_model(sequence, len(sequence))

    def target(self, sequence: Sequence, position: int) -> Combination:
        return self._only[self._coin_model(sequence, position)]

    def may_propose(self, sequence: Sequence, model: int) -> bool:
        return model == 0 and self._drafts(sequence)

    def _drafts(self, sequence: Sequence) -> bool:
        """Model 0 goes on with its window."""
        if sequence.is_closed or sequence.num_pending >= self._max_pending or self._kappa == 0:
            return False
        if self._coin_model(sequence, len(sequence)) == 0:
            return True
        pending = range(sequence.num_verified, len(sequence))
        num_foreign = sum(self._coin_model(sequence, position) != 0 for position in pending)
        return num_foreign < self._kappa

    def _first_unscored(self, sequence: Sequence) -> int:
        """The model whose score the first pending token waits for."""
        return self._coin_model(sequence, sequence.num_verified)

    def _coin_model(self, sequence: Sequence, position: int) -> int:
        if sequence.coin_base is None:
            coin = uniform(sequence.params.seed, position, Purpose.COIN)
        else:
            coin = self._coins.coin(position + sequence.coin_base)
        # Weights sum to 1 but for rounding, which is less than what a coin is below it.
        return bisect_right(self._cumulative, coin)


class Chooser(Protocol):
    """Fills in what `auto` leaves open; see `engine.controller`."""

    def choose(self, sequence: Sequence) -> DecodingParams:
        """How `sequence` is decoded from here on; never a function of tokens yet to come."""
        ...

    def add(self, sequence: Sequence, model: int, accepted: float) -> None:
        """A proposal of `model` was verified, or would have been accepted so probably."""
        ...

    def lookup_length(self, sequence: Sequence, rate: float, num_found: int) -> int:
        """How many of `num_found` guessed tokens are worth scoring; `rate` as in PromptLookup."""
        ...


def may_shadow(decoding: DecodingParams) -> bool:
    """It is standard decoding, or may be for a while: all but a mixture share its law and text."""
    return decoding.strategy != "mixture"


def used_models(decoding: DecodingParams) -> frozenset[int]:
    """Models that score its positions or propose; of a mixture, those that coins may name."""
    return proposers(decoding).union(decoding.combination.scorers)


def proposers(decoding: DecodingParams) -> frozenset[int]:
    """Models whose proposals it has verified; of a mixture none, which keeps its first model's."""
    match decoding.strategy:
        case "cos":
            return frozenset(model for model, length in enumerate(decoding.gamma) if length)
        case "speculative":
            return frozenset((0,))
        case _:
            return frozenset()


class Strategies:
    """The strategy of each sequence; equal decoding parameters share one object.

    Attributes:
        is_shadowing: all that may decode by standard now; see `engine.shadow`.
    """

    def __init__(self, shared_coins: SharedCoins) -> None:
        self.shared_coins = shared_coins
        self.is_shadowing = False
        self.chooser: Chooser | None = None
        self.make = lru_cache(maxsize=_MAX_KEPT)(self._build)
        # By the identity of parameters, which are kept with it: hashing them takes longer.
        self._known: dict[int, tuple[DecodingParams, Strategy]] = {}

    def of(self, sequence: Sequence) -> Strategy:
        schedule = sequence.schedule
        known = self._known.get(id(schedule))
        if known is None:
            if len(self._known) >= _MAX_KEPT:
                self._known.clear()
            known = self._known[id(schedule)] = schedule, self.make(schedule)
        return known[1]

    def settle(self, sequence: Sequence) -> bool:
        """Decode `sequence` from here on as the chooser says; none of its tokens is pending.

        While standard decoding is measured, decode it so instead, whatever was chosen or asked for.
        Returns whether that is something new that was chosen.

        A sequence on shared coins stays there until nobody has looked at its next coin: leaving
        because of a coin's value would bias its text.
        """
        assert sequence.num_pending == 0
        decoding, was_shadowed = sequence.decoding, sequence.is_shadowed
        is_shadowed = self.is_shadowing and may_shadow(decoding) and not decoding.is_plain
        if not (decoding.is_auto or is_shadowed or was_shadowed):
            return False
        if sequence.coin_base is not None and not self.shared_coins.is_fresh(sequence):
            return False
        sequence.is_shadowed = is_shadowed
        if is_shadowed:
            chosen = _plain(decoding)
        else:
            chosen = self._choose(sequence) if decoding.is_auto else decoding
        if chosen == sequence.schedule:
            return False
        sequence.schedule = chosen
        sequence.coin_base = None
        if chosen.shared_coins:
            self.shared_coins.join(sequence)
        return not (is_shadowed or was_shadowed)

    def _choose(self, sequence: Sequence) -> DecodingParams:
        if self.chooser is None:
            strategy = sequence.decoding.strategy
            return replace(
                sequence.decoding,
                strategy="cos" if strategy == "auto" else strategy,
                is_gamma_auto=False,
                shared_coins=False,
            )
        chosen = self.chooser.choose(sequence)
        if chosen.shared_coins and not sequence.num_generated:
            # While it reads its prompt, others would look at the coins that it joined at.
            return _plain(chosen)
        return chosen

    def _build(self, decoding: DecodingParams) -> Strategy:
        match decoding.strategy:
            case "standard" | "single":
                return Standard(decoding)
            case "speculative":
                return Speculative(decoding)
            case "cos" | "auto":
                return Cos(decoding)
            case "mixture":
                return Mixture(decoding, self.shared_coins)


def _plain(decoding: DecodingParams) -> DecodingParams:
    """Standard decoding of the same combination."""
    return replace(
        decoding, strategy="standard", is_gamma_auto=False, shared_coins=False, lookup=None
    )

"""What a way of decoding takes: how often each model runs in it, times what that takes now.

And how far that is uncertain, where its forwards were not timed lately.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence as Row
from dataclasses import dataclass, replace

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams
from server.decoding.profile import Chain, Profile, StepShape
from server.decoding.strategies import Strategies
from server.engine.bounded import make_room
from server.engine.cost_table import MOST_DOUBT, CostTable
from server.engine.rates import BUCKETS, Rates

_MAX_GAP = 12  # mixture: tokens that a model may have to catch up, above which mass is negligible
_OPTIMISM = 1.0  # deviations that a forward may be faster than timed, but not than one of one token
MOST_UPSIDE = 1 / (1 - _OPTIMISM * MOST_DOUBT)


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """How well the seconds of a way of decoding are known.

    Attributes:
        doubt: their relative deviation.
        upside: it may turn out to be so many times faster, at most MOST_UPSIDE.
    """

    doubt: float = 0.0
    upside: float = 1.0


class Predictor:
    """Seconds of verified tokens by the profiles of strategies and the cost table.

    Of those that are not forced: models read the forced ones together with others, which is all
    that these take (`engine.forcing`).
    """

    def __init__(self, costs: CostTable, strategies: Strategies) -> None:
        self._costs = costs
        self._strategies = strategies
        self._chains: dict[tuple[DecodingParams, bool], Chain] = {}
        self._profiles: dict[tuple[Chain, tuple[int, ...]], Profile] = {}
        self._known: dict[tuple[StepShape, float, float], tuple[float, float]] = {}

    def forget_seconds(self) -> None:
        """The cost table has changed."""
        self._known.clear()

    def token_seconds(self, decoding: DecodingParams, rates: Rates, batch: int) -> float:
        """Predicted seconds of a verified token of one sequence, `batch` of them decoding."""
        if decoding.strategy == "mixture":
            # It forces no tokens: it draws them like all others.
            return (1 + rates.forced) * self._mixture_seconds(decoding, batch) / batch
        profile = self.profile(decoding, rates)
        seconds = 0.0
        for shape, rate in profile.rates.items():
            together = profile.num_together(shape.model, batch)
            more = _num_read(profile, shape.model, rates)
            seconds += rate * sum(self._step_seconds(shape, together, more)) * batch / together
        return seconds / batch

    def halved_seconds(
        self,
        decoding: DecodingParams,
        rates: Rates,
        batch: int,
        device_numbers: Row[int],
    ) -> float:
        """`token_seconds` where one half of the sequences goes on beside the other.

        Each device does for both halves what its models do; and no half is done before all has been
        done for it, one thing after the other. Infinite for a mixture: with shared coins one half
        waits for the other, and with its own every step calls all models.

        `device_numbers` [num_models] are those of the models, 0 where tokens are decided.
        """
        if decoding.strategy == "mixture":
            return math.inf
        half = batch / 2
        profile = self.profile(decoding, rates)
        loads: defaultdict[int, float] = defaultdict(float)
        for shape, rate in profile.rates.items():
            together = profile.num_together(shape.model, half)
            more = _num_read(profile, shape.model, rates)
            forward, rest = self._step_seconds(shape, together, more)
            loads[device_numbers[shape.model]] += rate * forward * half / together
            loads[0] += rate * rest * half / together
        return max(2 * max(loads.values()), sum(loads.values())) / batch

    def uncertainty(self, decoding: DecodingParams, rates: Rates, batch: int) -> Uncertainty:
        """Of the seconds of its forwards, those of standard decoding being known."""
        if decoding.strategy == "mixture":
            return Uncertainty()
        costs = self._costs
        total = doubtful = least = 0.0
        profile = self.profile(decoding, rates)
        for shape, rate in profile.rates.items():
            together = profile.num_together(shape.model, batch)
            rate *= batch / together
            doubt = costs.doubt(shape.model, together, shape.num_tokens)
            more = _num_read(profile, shape.model, rates)
            if more:
                # Few sequences feed forced tokens in some steps only, and many in all of them.
                doubt = min(doubt, costs.doubt(shape.model, together, shape.num_tokens + more))
            seconds, _ = self._step_seconds(shape, together, more)
            floor = min(seconds, costs.forward_seconds(shape.model, together, 1))
            total += rate * seconds
            doubtful += rate * seconds * doubt
            least += rate * max(floor, seconds * (1 - _OPTIMISM * doubt))
        return Uncertainty(doubtful / total, total / least)

    def profile(self, decoding: DecodingParams, rates: Rates) -> Profile:
        """Of any strategy but a mixture."""
        runs = round(rates.runs * BUCKETS)
        chain = self._chain(decoding, has_forced=runs > 0)
        accepted = (
            round(rate * BUCKETS) if model in chain.proposers else 0
            for model, rate in enumerate(rates.acceptance)
        )
        key = (chain, (runs, *accepted))
        if key not in self._profiles:
            make_room(self._profiles)
            runs_rate, *acceptance = (bucket / BUCKETS for bucket in key[1])
            self._profiles[key] = chain.profile(tuple(acceptance), runs_rate)
        return self._profiles[key]

    def _step_seconds(self, shape: StepShape, batch: float, more: float) -> tuple[float, float]:
        """Of the forward, over `more` tokens of each than the shape has, and of the rest."""
        key = (shape, batch, more)
        if key not in self._known:
            rest = self._costs.rest_seconds(
                batch,
                num_drawn=shape.num_drawn * batch,
                num_verified=shape.num_verified * batch,
                num_proposed=shape.num_proposed * batch,
            )
            forward = self._costs.forward_seconds(shape.model, batch, shape.num_tokens + more)
            self._known[key] = forward, rest
        return self._known[key]

    def _mixture_seconds(self, decoding: DecodingParams, batch: int) -> float:
        """With shared coins and no drafts: the coin's model catches up, and draws for all."""
        total = self._costs.rest_seconds(batch, num_drawn=batch)
        for model in decoding.combination.scorers:
            weight = decoding.combination.weights[model]
            left = 1.0  # probability that its last coin is longer ago
            for gap in range(1, _MAX_GAP + 1):
                chance = left if gap == _MAX_GAP else left * weight
                total += weight * chance * self._costs.forward_seconds(model, batch, gap)
                left -= chance
        return total

    def _chain(self, decoding: DecodingParams, has_forced: bool) -> Chain:
        chain = self._chains.get((decoding, has_forced))
        if chain is None:
            # Weights do not matter for who runs when, but for being zero.
            weights = tuple(float(weight != 0) for weight in decoding.combination.weights)
            alike = replace(decoding, combination=Combination("linear", weights))
            chain = self._chains.get((alike, has_forced)) or Chain(
                alike, self._strategies.make(alike), has_forced
            )
            make_room(self._chains)
            self._chains[alike, has_forced] = self._chains[decoding, has_forced] = chain
        return chain


def _num_read(profile: Profile, model: int, rates: Rates) -> float:
    """Forced tokens that `model` reads in a forward beside those that the profile has."""
    forced = max(0.0, rates.forced - profile.num_forced)
    return forced / profile.forwards[model] if forced else 0.0

"""What ways of decoding really take beside what is predicted of them."""

from __future__ import annotations

import math

from server.core.sampling_params import DecodingParams
from server.engine.bounded import make_room
from server.engine.cost_table import Ratio

_MEMORY = 10.0  # predicted seconds of decoding
_PRIOR = 2.0
_GRUDGE = 120.0  # seconds of decoding after which 63 % of that is forgotten
_LOW, _HIGH = 0.8, 4.0

_Key = tuple[str, int, tuple[int, ...]]


class Reality:
    """Seconds over predicted ones, by strategy, proposal lengths and about so many sequences.

    Predictions are of a large batch of texts whose proposals are accepted alike. How far that holds
    depends on the lengths as well as on the strategy.
    """

    def __init__(self) -> None:
        self._ratios: dict[_Key, Ratio] = {}

    def add(self, choice: DecodingParams, batch: int, seconds: float, predicted: float) -> None:
        """What `choice` took with `batch` sequences, for tokens predicted to take `predicted`."""
        for ratio in self._of(choice, batch):
            ratio.add(seconds, predicted)

    def forget(self, seconds: float) -> None:
        """So many seconds have passed: what was left because it was slow is tried again later."""
        for ratio in self._ratios.values():
            ratio.forget(-math.expm1(-seconds / _GRUDGE))

    def value(self, choice: DecodingParams, batch: int) -> float:
        """What was not tried is taken to be like other lengths of its strategy."""
        own, of_strategy = self._of(choice, batch)
        return min(_HIGH, max(_LOW, own.value(prior=of_strategy.value())))

    def _of(self, choice: DecodingParams, batch: int) -> tuple[Ratio, Ratio]:
        make_room(self._ratios)
        size = round(math.log2(max(1, batch)))
        of_strategy = self._ratio((choice.strategy, size, ()))
        return self._ratio((choice.strategy, size, choice.gamma)), of_strategy

    def _ratio(self, key: _Key) -> Ratio:
        return self._ratios.setdefault(key, Ratio(_MEMORY, _PRIOR))

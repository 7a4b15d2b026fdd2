"""Whether half-batches pay: one half of the sequences on one device, the other on another."""

from __future__ import annotations

from collections.abc import Sequence as Row

from server.core.sampling_params import DecodingParams
from server.engine.predictor import Predictor
from server.engine.rates import Rates

# They must promise so much more than one batch, and as long as they are on, so much.
# A forward over half as many sequences takes more than half as long, and what is said of it at
# sizes that were not timed is a guess.
_MARGIN = 1.1
_KEPT = 1.03


class HalfBatches:
    """On where they pay, or as was asked for.

    Attributes:
        is_open: whether they pay is for `look` to say.
        is_on: they do, as far as is known.
    """

    def __init__(self, predictor: Predictor, device_numbers: Row[int], wanted: bool | None) -> None:
        """`device_numbers` [num_models] as in `Predictor`; `wanted`: None for wherever they pay."""
        self.is_on = bool(wanted)
        self._predictor = predictor
        self._device_numbers = device_numbers
        self.is_open = wanted is None and len(set(device_numbers)) > 1

    def look(self, decoding: DecodingParams, rates: Rates, batch: int) -> None:
        """Choose anew; `batch` sequences are decoded so."""
        if batch < 2:
            self.is_on = False
            return
        whole = self._predictor.token_seconds(decoding, rates, batch)
        halved = self._predictor.halved_seconds(decoding, rates, batch, self._device_numbers)
        self.is_on = whole >= halved * (_KEPT if self.is_on else _MARGIN)

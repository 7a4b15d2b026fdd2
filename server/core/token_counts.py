"""How often each token occurs in a text: what penalties look at, kept as the text grows."""

from __future__ import annotations

from collections.abc import Sequence as Row

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

_FIRST_ROOM = 64  # for so many tokens that the prompt has not


class TokenCounts:
    """Of one text, whose verified tokens never change.

    A text that was counted anew for each position would be read as often as it has tokens.
    """

    def __init__(self) -> None:
        self._length = 0  # tokens that are counted
        self._places: dict[int, int] = {}  # of tokens, in the two below
        self._tokens: Ids = np.zeros(0, np.int64)
        self._counts: Ids = np.zeros(0, np.int64)

    def before(
        self, token_ids: Row[int], num_prompt: int, num_verified: int, position: int
    ) -> tuple[Ids, Ids]:
        """The tokens before a position of a text that begins with that of the last call.

        Returns:
            Each of them once, in the order in which they came, and how often each was generated,
            so 0 for those of the prompt alone. Not to be written to.
        """
        if position < self._length:  # it was decided some time ago
            return TokenCounts().before(token_ids, num_prompt, position, position)
        if not self._length:
            self._begin(token_ids[: min(num_prompt, position)])
        for place in range(self._length, min(num_verified, position)):
            self._add(token_ids[place])
        size = len(self._places)
        tokens, counts = self._tokens[:size], self._counts[:size]
        pending = token_ids[self._length : position]
        return self._with(pending, tokens, counts) if pending else (tokens, counts)

    def _begin(self, prompt: Row[int]) -> None:
        """Tokens of it occur, and were never generated."""
        self._length = len(prompt)
        found = dict.fromkeys(prompt)
        self._places = dict(zip(found, range(len(found)), strict=True))
        unused = np.zeros(_FIRST_ROOM, np.int64)
        self._tokens = np.concatenate([np.array([*found], np.int64), unused])
        self._counts = np.zeros_like(self._tokens)

    def _add(self, token_id: int) -> None:
        """One that was generated."""
        self._length += 1
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token_id
        self._counts[place] += 1

    def _with(self, pending: Row[int], tokens: Ids, counts: Ids) -> tuple[Ids, Ids]:
        """As if these had been generated, too."""
        counts, new = counts.copy(), dict[int, int]()
        for token_id in pending:
            place = self._places.get(token_id)
            if place is None:
                new[token_id] = new.get(token_id, 0) + 1
            else:
                counts[place] += 1
        return (
            np.concatenate([tokens, np.array([*new], np.int64)]),
            np.concatenate([counts, np.array([*new.values()], np.int64)]),
        )

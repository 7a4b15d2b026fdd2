"""Prompt lookup: what followed the last few tokens where they stood before, guessed to come again.

A text that copies from its prompt or from itself has most of its tokens guessed without a model.
A guess is a function of the tokens before it, so as a proposal its distribution is one token's.
"""

from __future__ import annotations

import math
from itertools import takewhile

from server.core.sampling_params import LookupParams

LOOKUP = -1  # stands among proposers where no model has proposed

_MAX_INDEXED = 1024  # tokens in one go: choices of one long prompt all begin in the same step
_MAX_PLACES = 32  # earlier places that are compared, the latest ones
_MEMORY = 32.0  # guessed tokens after which 63 % of what came before is forgotten
_PRIOR_RATE = 0.5
_PRIOR_WEIGHT = 2.0  # guessed tokens that it counts for


class PromptLookup:
    """Guesses the next tokens of one sequence, and knows how often it was right of late.

    What is guessed and not proposed is judged too, by the tokens that came in its place: a token x
    is drawn from the target r as often as a proposal x would have been accepted.
    """

    def __init__(self, params: LookupParams) -> None:
        self._params = params
        # Places are named by their ends: the number of tokens up to and including the last.
        self._latest: dict[tuple[int, ...], int] = {}  # where each n-gram of min_ngram ended last
        self._earlier: list[int] = []  # where the n-gram that ends here ended before; 0: nowhere
        self._guess: list[int] = []
        self._num_known = 0  # tokens when it was made
        self._right = 0.0
        self._judged = 0.0

    @property
    def rate(self) -> float:
        """Probability that a guessed token is right where those before it were."""
        return (self._right + _PRIOR_WEIGHT * _PRIOR_RATE) / (self._judged + _PRIOR_WEIGHT)

    def is_due(self, num_tokens: int) -> bool:
        """Nothing was guessed yet to follow so many tokens."""
        return num_tokens > self._num_known

    def guess(self, token_ids: list[int]) -> list[int]:
        """At most max_tokens that may follow; empty where the last ones are new.

        And while a long prompt is not yet indexed. `token_ids` are decided, and begin with those of
        the call before.
        """
        self._judge(token_ids)
        self._index(token_ids)
        self._guess = self._find(token_ids)
        self._num_known = len(token_ids)
        return list(self._guess)

    def _judge(self, token_ids: list[int]) -> None:
        """Count the last guess up to its first wrong token."""
        came = token_ids[self._num_known : self._num_known + len(self._guess)]
        pairs = zip(self._guess, came, strict=False)
        num_right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        num_judged = min(len(came), num_right + 1)
        kept = math.exp(-num_judged / _MEMORY)
        self._right = self._right * kept + num_right
        self._judged = self._judged * kept + num_judged

    def _index(self, token_ids: list[int]) -> None:
        size = self._params.min_ngram
        start = len(self._earlier)
        for end in range(start, min(len(token_ids) + 1, start + _MAX_INDEXED)):
            if end < size:
                self._earlier.append(0)
                continue
            ngram = tuple(token_ids[end - size : end])
            self._earlier.append(self._latest.get(ngram, 0))
            self._latest[ngram] = end

    def _find(self, token_ids: list[int]) -> list[int]:
        """What followed the longest match; of several, the latest."""
        longest, place = 0, 0
        end = self._earlier[-1] if len(self._earlier) > len(token_ids) else 0
        for _ in range(_MAX_PLACES):
            if not end or longest == self._params.max_ngram:
                break
            if (length := self._match(token_ids, end)) > longest:
                longest, place = length, end
            end = self._earlier[end]
        if not place:
            return []
        # What is copied may reach into the copy: a text that repeats goes on repeating.
        period = len(token_ids) - place
        return [token_ids[place + i % period] for i in range(self._params.max_tokens)]

    def _match(self, token_ids: list[int], end: int) -> int:
        """How many tokens before `end` are the last ones again, at most max_ngram."""
        length = self._params.min_ngram
        most = min(self._params.max_ngram, end)
        while length < most and token_ids[end - 1 - length] == token_ids[-1 - length]:
            length += 1
        return length

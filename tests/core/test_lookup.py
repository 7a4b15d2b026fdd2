"""What prompt lookup guesses, and how it learns whether that was right."""

from __future__ import annotations

import random

import pytest

from server.core.lookup import PromptLookup
from server.core.sampling_params import LookupParams


def guess(tokens: list[int], max_ngram: int = 3, min_ngram: int = 2, length: int = 3) -> list[int]:
    return PromptLookup(LookupParams(max_ngram, min_ngram, length)).guess(tokens)


def naive(tokens: list[int], max_ngram: int, min_ngram: int, length: int) -> list[int]:
    """By definition: the longest match, the latest of equal ones, copied token by token."""
    for size in range(max_ngram, min_ngram - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                copied = list(tokens)
                for i in range(length):
                    copied.append(copied[end + i])
                return copied[len(tokens) :]
    return []


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5]),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),  # the latest
        ([7, 1, 2, 3, 1, 2, 4, 7, 1, 2], [3, 1, 2]),  # the longest
        ([1, 2, 9, 1, 2, 8, 2, 1, 2], [8, 2, 1]),  # before the first token there is none
        ([5, 6, 5, 6], [5, 6, 5]),  # into the copy itself
        ([3, 3, 3], [3, 3, 3]),
        ([1, 2, 3, 4, 2], []),  # one token is too few
        ([1], []),
        ([1, 2], []),
    ],
)
def test_what_is_guessed(tokens: list[int], expected: list[int]) -> None:
    assert guess(tokens) == expected


@pytest.mark.parametrize(("max_ngram", "min_ngram"), [(1, 1), (3, 1), (4, 2), (3, 3)])
def test_a_growing_text_is_searched_as_by_definition(max_ngram: int, min_ngram: int) -> None:
    choose = random.Random(max_ngram)
    lookup = PromptLookup(LookupParams(max_ngram, min_ngram, 4))
    tokens = [choose.randrange(4) for _ in range(9)]
    num_found = 0
    while len(tokens) < 40:
        found = lookup.guess(tokens)
        num_found += bool(found)
        assert found == naive(tokens, max_ngram, min_ngram, 4)
        tokens += [choose.randrange(4) for _ in range(choose.randrange(1, 4))]
    assert num_found > 3


def test_it_knows_how_often_it_was_right() -> None:
    lookup = PromptLookup(LookupParams(2, 1, 4))
    first = lookup.rate
    tokens = [1, 2, 3, 4, 1]
    assert lookup.guess(tokens) == [2, 3, 4, 1]
    tokens += [2, 3, 4, 1]
    lookup.guess(tokens)
    assert lookup.rate > first
    for new in range(10, 22):
        tokens += [new]
        lookup.guess(tokens)
        tokens += [1]
        lookup.guess(tokens)
    assert lookup.rate < 0.3
    for _ in range(30):
        tokens += [2, 3, 4, 1]
        lookup.guess(tokens)
    assert lookup.rate > 0.9, "old failures are forgotten"


def test_tokens_behind_a_wrong_one_are_not_judged() -> None:
    lookup = PromptLookup(LookupParams(2, 2, 8))
    tokens = [1, 2, 3, 4, 5, 6, 1, 2]
    assert lookup.guess(tokens) == [3, 4, 5, 6, 1, 2, 3, 4]
    lookup.guess([*tokens, 9, 4, 5, 6])
    assert lookup.rate == pytest.approx((0 + 2 * 0.5) / (1 + 2))


def test_one_guess_for_each_number_of_tokens() -> None:
    lookup = PromptLookup(LookupParams(2, 1, 2))
    assert lookup.is_due(3)
    lookup.guess([1, 2, 1])
    assert not lookup.is_due(3)
    assert lookup.is_due(4)


def test_a_long_prompt_is_indexed_in_parts() -> None:
    """What stands at its end is found once all of it is known, as if it had been at once."""
    rng = random.Random(5)
    tokens = [rng.randrange(1000) for _ in range(2500)]
    lookup = PromptLookup(LookupParams(2, 2, 3))
    guesses = []
    for place in range(100, 106):  # the text copies what stands in the prompt's midst
        tokens.append(tokens[place])
        guesses.append(lookup.guess(tokens))
    assert guesses[:2] == [[], []]
    assert guesses[2:] == [tokens[place + 1 : place + 4] for place in range(102, 106)]

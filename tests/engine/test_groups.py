"""Whose decoding is chosen together, and between what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.config import StrategyName
from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.engine import bounded
from server.engine.groups import Group, Groups
from server.engine.rates import Rates

AUTO = DecodingParams("auto", Combination.contrastive(2, 0.1), (1, 1), is_gamma_auto=True)
STANDARD = replace(AUTO, strategy="standard", is_gamma_auto=False)
CHOICES = (STANDARD, *(replace(STANDARD, strategy="cos", gamma=(k, 1)) for k in range(1, 13)))


def make_sequence(decoding: DecodingParams = AUTO, temperature: float = 1.0) -> Sequence:
    return Sequence.start("s", [1, 2], SamplingParams(temperature=temperature), decoding)


def test_of_many_ways_the_best_are_compared_and_all_from_time_to_time() -> None:
    group = Group(CHOICES, STANDARD)
    seconds = {choice: 20.0 - index for index, choice in enumerate(CHOICES)}
    sizes = []
    for _ in range(9):
        sizes.append(len(group.compared))
        assert {STANDARD, group.chosen} <= set(group.compared)
        group.note_compared({choice: seconds[choice] for choice in group.compared})
        group.take(CHOICES[1])  # it is none of the best
    assert sizes == [13, 10, 10, 10, 13, 10, 10, 10, 13]
    assert group.near == (STANDARD, *reversed(CHOICES[-8:]))


def test_acceptance_is_followed_where_it_moves_by_more_than_a_little() -> None:
    group = Group(CHOICES, STANDARD)
    taken = []
    for rate in (0.5, 0.53, 0.47, 0.55, 0.52, 0.5):
        group.note_rates(Rates((0.9, rate)))
        taken.append(group.rates.acceptance[1])
    assert taken == [0.5, 0.5, 0.5, 0.55, 0.55, 0.5]


@pytest.mark.parametrize("rates", [Rates((0.9,), 0.2, 0.5), Rates((0.9,), 0.1, 0.6)])
def test_forced_tokens_are_followed_too(rates: Rates) -> None:
    group = Group(CHOICES, STANDARD, rates=Rates((0.9,), 0.1, 0.5))
    group.note_rates(rates)
    assert group.rates == rates


def test_what_is_taken_begins_anew() -> None:
    group = Group(CHOICES, STANDARD, num_steps=16, seconds=2.0)
    assert group.is_new
    group.take(CHOICES[1])
    assert (group.chosen, group.is_new) == (CHOICES[1], False)
    assert (group.num_steps, group.seconds) == (0, 0.0)


@pytest.mark.parametrize("strategy", ["auto", "cos", "speculative"])
def test_standard_decoding_is_compared_with_where_it_is_open(strategy: StrategyName) -> None:
    group = Groups(8).of(make_sequence(replace(AUTO, strategy=strategy)))
    assert (group.baseline is not None) is (strategy == "auto")


def test_one_group_is_of_one_decoding_and_kind() -> None:
    groups = Groups(8)
    group = groups.of(make_sequence())
    assert groups.of(make_sequence(replace(AUTO))) is group
    assert groups.of(make_sequence(temperature=0.0)) is not group
    assert groups.of(make_sequence(replace(AUTO, gamma=(2, 1)))) is not group


def test_who_decodes_is_divided_and_who_reads_is_left_out() -> None:
    groups = Groups(8)
    first, second, other = make_sequence(), make_sequence(), make_sequence(STANDARD)
    reading, greedy = make_sequence(STANDARD), make_sequence(temperature=0.0)
    reading.resume_at[0] = 2
    group = groups.of(first)
    first.schedule = second.schedule = group.chosen
    division = groups.divide([first, reading, second])
    assert division.members == {group: [first, second]}
    assert (division.num_members, division.is_united, division.has_others) == (2, True, False)
    assert groups.divide([first, other]).has_others
    assert not groups.divide([first, greedy]).is_united
    second.schedule = CHOICES[1]
    assert not groups.divide([first, second]).is_united
    assert not groups.divide([]).is_united


def test_groups_of_the_past_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MAX_KEPT", 3)
    groups = Groups(8)
    for number in range(1, 20):
        combination = Combination.weighted([1 / number, 1 - 1 / number])
        sequence = make_sequence(replace(AUTO, combination=combination))
        group = groups.of(sequence)
        assert groups.of(sequence) is group
        assert group.choices[0].combination == combination
        assert max(len(groups._groups), len(groups._by_id)) <= 3

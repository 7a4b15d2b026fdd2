from __future__ import annotations

import torch

from server.cache.score_store import ScoreStore, num_score_rows

CPU = torch.device("cpu")


def test_rings_keep_slots_models_and_positions_apart() -> None:
    store = ScoreStore(3, 4, 5, [torch.float32, torch.bfloat16], [CPU, CPU])
    slots = [store.take_slot() for _ in range(3)]
    expected = {}
    for model in range(2):
        for slot in slots:
            for position in range(10, 14):  # as many as the ring holds
                row = torch.full((1, 5), float(model * 100 + slot * 10 + position % 7))
                store.write(model, [store.index(slot, position)], row)
                expected[model, slot, position] = row
    for (model, slot, position), row in expected.items():
        read = store.read(model, [store.index(slot, position)], CPU)
        assert read.dtype == torch.float32
        assert torch.equal(read, row)
    store.give_back(slots[1])
    assert store.take_slot() == slots[1]


def test_one_wide_ring_is_lent_to_one_prompt_at_a_time() -> None:
    store = ScoreStore(2, 4, 5, [torch.float32], [CPU], wide_capacity=8)
    first, second = store.take_slot(), store.take_slot()
    wide = store.take_prompt_slot(first)
    assert [store.num_positions(slot) for slot in (first, second, wide)] == [4, 4, 8]
    rows = [
        store.index(slot, position)
        for slot in (first, second, wide)
        for position in range(10, 10 + store.num_positions(slot))
    ]
    assert sorted(rows) == list(range(store.num_rows))
    for _ in range(2):
        assert store.take_prompt_slot(second) == second
        store.give_back_prompt_slot(second)
    store.give_back_prompt_slot(wide)
    assert store.take_prompt_slot(second) == wide


def test_a_wide_ring_that_is_no_wider_is_left_out() -> None:
    store = ScoreStore(2, 4, 5, [torch.float32], [CPU], wide_capacity=4)
    slot = store.take_slot()
    assert store.take_prompt_slot(slot) == slot
    assert store.num_rows == num_score_rows(2, 4, 4) == 8


def test_scores_are_deferred_until_they_are_written() -> None:
    store = ScoreStore(1, 4, 5, [torch.float32], [CPU], state_sizes=[3])
    states = torch.randn(2, 3)
    store.write_states(0, [0, 2], states)
    assert store.deferred(0, [0, 1, 2]) == [0, 2]
    assert torch.equal(store.states(0, [2, 0]), states.flip(0))
    store.write(0, [2], torch.zeros(1, 5))
    assert store.deferred(0, [0, 1, 2]) == [0]

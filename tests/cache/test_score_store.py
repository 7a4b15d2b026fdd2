from __future__ import annotations

import torch

from server.cache.score_store import ScoreStore

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

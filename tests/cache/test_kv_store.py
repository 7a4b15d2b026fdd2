from __future__ import annotations

import torch

from server.cache.kv_store import KVStore


def test_keys_and_values_of_layers_may_differ() -> None:
    store = KVStore(num_pages=3, page_size=4)
    shapes = [((2, 6), (2, 3)), ((1, 4), (1, 4))]
    slots = torch.tensor([4, 9])
    written = [[torch.randn(2, *shape) for shape in layer] for layer in shapes]
    for layer, (keys, values) in enumerate(written):
        store.write(layer, slots, keys, values)
    for layer, expected in enumerate(written):
        for found, rows in zip(store.read(layer, slots[None]), expected, strict=True):
            assert torch.equal(found[0], rows)
    assert store.bytes_per_token == 4 * (12 + 6 + 4 + 4)
    larger = store.resized(num_pages=5, page_size=8)
    assert (larger.num_layers, larger.bytes_per_token) == (2, store.bytes_per_token)
    for layer, layer_shapes in enumerate(shapes):
        assert [tuple(memory.shape) for memory in larger.slots(layer)] == [
            (40, *shape) for shape in layer_shapes
        ]

"""The KV memory of one model: two tensors for each layer, cut into pages."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class KVStore:
    """Keys and values by layer, each [num_pages, page_size, kv_heads, head_dim].

    Slot s is token s % page_size of page s // page_size. Page 0 belongs to nobody: masked
    keys are read from it, so it has to stay finite, and only spans that pad a static-shape forward
    write it. No other slot is read before its owner has written it, so whatever a page's last owner
    left there, NaN too, does no harm. A layer is
    allocated when it is first written, because only then its shapes are known (keys and values
    may differ, and so may layers).
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """`num_pages` counts page 0; `page_size` is in tokens."""
        self.num_pages = num_pages
        self.page_size = page_size
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        # The same memory by slot, [num_pages * page_size, kv_heads, head_dim].
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_layers(self) -> int:
        """Layers written so far."""
        return len(self._keys)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers written so far."""
        tensors = [*self._keys.values(), *self._values.values()]
        return sum(math.prod(t.shape[2:]) * t.element_size() for t in tensors)

    def has(self, layer: int) -> bool:
        """Has it been written, or allocated?"""
        return layer in self._slots

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer that has been written, [slots, kv_heads, dim] each."""
        return self._slots[layer]

    def resized(self, num_pages: int, page_size: int) -> KVStore:
        """An empty store for the same layers, allocated now."""
        store = KVStore(num_pages, page_size)
        for layer, keys in self._keys.items():
            store.allocate(layer, keys[0, 0], self._values[layer][0, 0])
        return store

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys [T, kv_heads, head_dim] and values of one layer at `slots` [T] int64."""
        self.allocate(layer, keys[0], values[0])
        stored_keys, stored_values = self._slots[layer]
        stored_keys.index_copy_(0, slots, keys)
        stored_values.index_copy_(0, slots, values)

    def read(self, layer: int, slots: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer at `slots`.

        Args:
            layer: index of a layer that has been written.
            slots: consecutive slots as a slice, or their numbers [B, L] int64.

        Returns:
            [L, kv_heads, head_dim] each, views; or [B, L, kv_heads, head_dim] each, copies.
        """
        keys, values = self._slots[layer]
        if isinstance(slots, slice):
            return keys[slots], values[slots]
        flat = slots.flatten()
        return (
            keys.index_select(0, flat).view(*slots.shape, *keys.shape[1:]),
            values.index_select(0, flat).view(*slots.shape, *values.shape[1:]),
        )

    def allocate(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """If a layer is not yet: `keys` and `values` [kv_heads, dim] are like those of a token."""
        if layer in self._keys:
            return
        self._keys[layer] = self._zeros(keys)
        self._values[layer] = self._zeros(values)
        self._slots[layer] = (self._keys[layer].flatten(0, 1), self._values[layer].flatten(0, 1))

    def _zeros(self, like: Tensor) -> Tensor:
        """[num_pages, page_size, *like.shape] of `like`'s dtype and device."""
        shape = (self.num_pages, self.page_size, *like.shape)
        if like.device.type != "cpu":
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        # numpy's zeros are untouched memory: pages cost nothing until they are first written.
        memory = np.zeros(math.prod(shape) * like.element_size(), dtype=np.uint8)
        return torch.from_numpy(memory).view(like.dtype).view(shape)

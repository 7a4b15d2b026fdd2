"""Raw scores (logits) of the positions that are still undecided, for every model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ScoreStore:
    """One ring of `capacity` positions per (model, slot).

    Undecided positions of a sequence are consecutive and fewer than `capacity`, so position
    modulo capacity never collides. Rolling back needs no call: stale rows are overwritten by the
    forward that scores the position anew.
    """

    def __init__(
        self,
        num_slots: int,
        capacity: int,
        vocab_size: int,
        dtypes: Sequence[torch.dtype],
        devices: Sequence[torch.device],
    ) -> None:
        """One tensor [num_slots * capacity, vocab_size] per model, in its dtype, on its device."""
        self.capacity = capacity
        self._rows = [
            torch.empty(num_slots * capacity, vocab_size, dtype=dtype, device=device)
            for dtype, device in zip(dtypes, devices, strict=True)
        ]
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take_slot(self) -> int:
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        assert slot not in self._free
        self._free.append(slot)

    def index(self, slot: int, position: int) -> int:
        """Row of (slot, position) in the tensor of any model."""
        return slot * self.capacity + position % self.capacity

    def write(self, model: int, rows: Sequence[int], logits: Tensor) -> None:
        """Store logits [len(rows), vocab_size] at `rows` (see `index`)."""
        store = self._rows[model]
        store.index_copy_(0, torch.tensor(rows, device=store.device), logits.to(store.dtype))

    def read(self, model: int, rows: Sequence[int], device: torch.device) -> Tensor:
        """Scores [len(rows), vocab_size] as float32 on `device`."""
        store = self._rows[model]
        picked = store.index_select(0, torch.tensor(rows, device=store.device))
        return picked.to(device=device, dtype=torch.float32)

"""Raw scores (logits) of the positions that are still open, for every model.

Where a model defers its scores the store holds its state of the position until they are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.cache.devices import score_devices
from server.cache.on_device import tensor_on

PROMPT_WINDOW = 128  # positions of one prompt that all its scorers score before they are reported


def num_score_rows(num_slots: int, capacity: int, wide_capacity: int) -> int:
    """Rows of the tensor of each model; see `ScoreStore`."""
    return num_slots * capacity + (wide_capacity if wide_capacity > capacity else 0)


class ScoreStore:
    """One ring of `capacity` positions per (model, slot), and one wider ring.

    Undecided positions of a sequence are consecutive and fewer than `capacity`, so position
    modulo capacity never collides. Rolling back needs no call: stale rows are overwritten by the
    forward that scores the position anew.

    The wide ring is lent to one sequence at a time whose prompt's log-probabilities are wanted;
    others score their prompts in their own rings, in shorter windows.
    """

    def __init__(
        self,
        num_slots: int,
        capacity: int,
        vocab_size: int,
        dtypes: Sequence[torch.dtype],
        devices: Sequence[torch.device],
        wide_capacity: int = 0,
        state_sizes: Sequence[int] = (),
    ) -> None:
        """One tensor [num_rows, vocab_size] per model, in its dtype; num_rows is `num_score_rows`.

        All of it is written once: memory that the system hands over page by page, at the first
        writing, would slow the first steps, those that the models are timed by among them.

        Args:
            num_slots: sequences that have a ring at once.
            capacity: positions of a ring.
            vocab_size: scores of a position.
            dtypes: [num_models], of scores and states.
            devices: [num_models], of the models and their states; where their scores are kept
                `score_devices` says.
            wide_capacity: positions of the wide ring; there is none if that is no wider.
            state_sizes: [num_models] width of a state, 0: the model never defers; (): none does.
        """
        self.capacity = capacity
        self._wide_slot = num_slots
        self._wide_capacity = wide_capacity if wide_capacity > capacity else 0
        self._wide_is_free = self._wide_capacity > 0
        num_rows = num_score_rows(num_slots, capacity, wide_capacity)
        # torch.zeros would only promise memory.
        self._rows = [
            torch.empty(num_rows, vocab_size, dtype=dtype, device=device).zero_()
            for dtype, device in zip(dtypes, score_devices(devices), strict=True)
        ]
        self._states = [
            torch.empty(num_rows, size, dtype=dtype, device=device).zero_()
            for size, dtype, device in zip(
                state_sizes or [0] * len(dtypes), dtypes, devices, strict=True
            )
        ]
        self._deferred: list[set[int]] = [set() for _ in self._rows]
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_rows(self) -> int:
        """Rows of the tensor of each model."""
        return len(self._rows[0])

    @property
    def num_free(self) -> int:
        """Slots that may be taken."""
        return len(self._free)

    def take_slot(self) -> int:
        """The number of a ring that nobody has. Raises IndexError where there is none."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Let others take a slot."""
        assert slot not in self._free
        self._free.append(slot)

    def take_prompt_slot(self, slot: int) -> int:
        """The wide ring if nobody has it, else the sequence's own `slot`."""
        if not self._wide_is_free:
            return slot
        self._wide_is_free = False
        return self._wide_slot

    def give_back_prompt_slot(self, slot: int) -> None:
        """What `take_prompt_slot` gave; a sequence's own slot stays its own."""
        if slot == self._wide_slot:
            self._wide_is_free = True

    def num_positions(self, slot: int) -> int:
        """Consecutive positions that the ring of `slot` holds."""
        return self._wide_capacity if slot == self._wide_slot else self.capacity

    def index(self, slot: int, position: int) -> int:
        """Row of (slot, position) in the tensor of any model."""
        # As `num_positions`, without another call: asked of every row several times in a step.
        if slot == self._wide_slot:
            return slot * self.capacity + position % self._wide_capacity
        return slot * self.capacity + position % self.capacity

    def write(self, model: int, rows: Sequence[int], logits: Tensor) -> None:
        """Store logits [len(rows), vocab_size] at `rows` (see `index`)."""
        store = self._rows[model]
        logits = logits.to(device=store.device, dtype=store.dtype)
        store.index_copy_(0, tensor_on(store.device, rows), logits)
        self._deferred[model].difference_update(rows)

    def write_states(self, model: int, rows: Sequence[int], states: Tensor) -> None:
        """Store states [len(rows), state_size]; the scores of these rows are deferred."""
        store = self._states[model]
        store.index_copy_(0, tensor_on(store.device, rows), states.to(store.dtype))
        self._deferred[model].update(rows)

    def deferred(self, model: int, rows: Sequence[int]) -> list[int]:
        """Those of `rows` whose scores must be written before they can be read."""
        return [row for row in rows if row in self._deferred[model]]

    def states(self, model: int, rows: Sequence[int]) -> Tensor:
        """The states last written at `rows`, [len(rows), state_size] in the model's dtype."""
        store = self._states[model]
        return store.index_select(0, tensor_on(store.device, rows))

    def addresses(self, model: int, rows: Sequence[int]) -> list[int]:
        """Of the scores of `model`, on a CPU."""
        store = self._rows[model]
        start, step = store.data_ptr(), store.stride(0) * store.itemsize
        return [start + row * step for row in rows]

    def read(self, model: int, rows: Sequence[int], device: torch.device) -> Tensor:
        """Scores [len(rows), vocab_size] as float32 on `device`."""
        store = self._rows[model]
        picked = store.index_select(0, tensor_on(store.device, rows))
        return picked.to(device=device, dtype=torch.float32)

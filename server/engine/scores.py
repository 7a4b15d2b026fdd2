"""What the models said about undecided positions: written by forwards, read by place.

Most of what a forward says decides something before its model runs again: it is left as it is until
then, and only what is still open goes to the store.

The head of a small model costs more than its layers. A model with a shortlist may *defer* its
scores: the forward leaves the states under the head, a proposal needs the shortlist's rows of the
head only, and the full scores of all positions that are verified together are computed in one
product, once.

Scores of a model on another GPU cross over as soon as there are any, in a stream beside the one
that decides: it goes on until it is told to `receive` them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence as Row
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from server.cache.devices import device_numbers, meeting_device
from server.cache.on_device import tensor_on
from server.cache.score_store import ScoreStore
from server.core.sequence import Sequence
from server.decoding.warp import Place
from server.runner.base import Batch, ModelRunner
from server.runner.crossing import Crossing


@dataclass(frozen=True, slots=True)
class _Latest:
    """What the last forward of a model has said, where the store has not got it.

    Attributes:
        places: that are scored.
        rows: of the store, where they belong.
        logits: [len(rows), V] in the model's dtype.
    """

    places: Row[Place]
    rows: Row[int]
    logits: Tensor

    def find(self, rows: Row[int]) -> list[int]:
        """Which of the logits belong to these rows of the store; -1 for none of them."""
        found = {row: number for number, row in enumerate(self.rows)}
        return [found.get(row, -1) for row in rows]

    def pick(self, numbers: list[int]) -> Tensor:
        """Those of the logits, which are not copied where they are all of them."""
        if numbers == list(range(len(self.logits))):
            return self.logits
        return self.logits.index_select(0, tensor_on(self.logits.device, numbers))


class Scores:
    """The score store seen from the engine.

    Attributes:
        head_seconds: spent on deferred scores and on shortlists since it was last set to zero.
    """

    def __init__(
        self,
        runners: Row[ModelRunner],
        store: ScoreStore,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        devices = [runner.device for runner in runners]
        self.device = meeting_device(devices)
        self.head_seconds = 0.0
        self._runners = runners
        self._store = store
        self._clock = clock
        self._latest: list[_Latest | None] = [None] * len(runners)
        self._crossings = [
            Crossing(self.device, device) if number else None
            for device, number in zip(devices, device_numbers(devices), strict=True)
        ]

    def has_shortlist(self, model: int) -> bool:
        return self._runners[model].deferred is not None

    def crossing(self, model: int) -> AbstractContextManager[None]:
        """In here what the deciding device is asked for `model` keeps no other waiting."""
        crossing = self._crossings[model]
        return nullcontext() if crossing is None else crossing.going()

    def forward(
        self, model: int, batch: Batch, kept: Row[Place], defer: bool
    ) -> torch.cuda.Event | None:
        """Run `model`; `kept` are the places that its kept rows score, `defer` as in the module.

        Returns what is to be received before any of these places is read.
        """
        self._settle(model, _is_open)
        rows = self.rows(kept)
        head = self._runners[model].deferred
        if defer and head is not None:
            states = head.states(batch)
            if rows:
                self._store.write_states(model, rows, states)
        else:
            logits = self._runners[model].forward(batch)
            if rows:
                return self._keep(model, _Latest(kept, rows, logits))
        return None

    def _keep(self, model: int, latest: _Latest) -> torch.cuda.Event | None:
        crossing = self._crossings[model]
        if crossing is None:
            self._latest[model] = latest
            return None
        with crossing.coming(latest.logits):
            self._store.write(model, latest.rows, latest.logits)
        return crossing.mark()

    def receive(self, model: int, sent: torch.cuda.Event | None) -> None:
        """Let what is decided from now on come after what `forward` has returned."""
        crossing = self._crossings[model]
        if crossing is not None and sent is not None:
            crossing.join(sent)

    def read(self, model: int, places: Row[Place]) -> Tensor:
        """Raw scores, float32 [len(places), V]; not to be written to."""
        rows = self.rows(places)
        if (latest := self._latest[model]) is not None:
            numbers = latest.find(rows)
            if -1 not in numbers:
                return latest.pick(numbers).to(device=self.device, dtype=torch.float32)
            if max(numbers) >= 0:
                self._settle(model, lambda sequence, position: True)
        self._complete(model, rows)
        return self._store.read(model, rows, self.device)

    def _complete(self, model: int, rows: Row[int]) -> None:
        """Give the store the scores of `rows` that were deferred."""
        missing = self._store.deferred(model, rows)
        head = self._runners[model].deferred
        if missing and head is not None:
            started = self._clock()
            self._store.write(model, missing, head.scores(self._store.states(model, missing)))
            self.head_seconds += self._clock() - started

    def _settle(self, model: int, is_wanted: Callable[[Sequence, int], bool]) -> None:
        """Give the store what the last forward of `model` has said of wanted places."""
        latest = self._latest[model]
        if latest is None:
            return
        numbers = [i for i, place in enumerate(latest.places) if is_wanted(*place)]
        if numbers:
            rows = [latest.rows[number] for number in numbers]
            self._store.write(model, rows, latest.pick(numbers))
        # Only now: where there was no memory for that, they are wanted yet.
        self._latest[model] = None

    def read_shortlist(self, model: int, places: Row[Place]) -> Tensor:
        """Raw scores of the shortlist of `model`, -inf elsewhere, float32 [len(places), V]."""
        listed, ids = self.shortlist(model, places)
        size = len(places), self._runners[model].vocab_size
        return listed.new_full(size, -torch.inf).index_copy_(1, ids, listed)

    def shortlist(self, model: int, places: Row[Place]) -> tuple[Tensor, Tensor]:
        """Raw scores of the shortlist of `model`, float32 [len(places), m], and its ids, int64 [m].

        The forwards that scored these places deferred.
        """
        head = self._runners[model].deferred
        assert head is not None
        started = self._clock()
        scores = head.shortlist_scores(self._store.states(model, self.rows(places)))
        self.head_seconds += self._clock() - started
        return scores.to(self.device), head.shortlist.to(self.device)

    def addresses(self, model: int, places: Row[Place]) -> list[int]:
        """Where the raw scores of `model`, in its `dtype`, lie in a CPU's memory.

        They lie there until the model runs again.
        """
        rows = self.rows(places)
        latest = self._latest[model]
        if latest is None:
            self._complete(model, rows)
            return self._store.addresses(model, rows)
        numbers = latest.find(rows)
        stored = [row for row, number in zip(rows, numbers, strict=True) if number < 0]
        self._complete(model, stored)
        others = iter(self._store.addresses(model, stored))
        start, step = latest.logits.data_ptr(), latest.logits.stride(0) * latest.logits.itemsize
        return [next(others) if number < 0 else start + number * step for number in numbers]

    def dtype(self, model: int) -> torch.dtype:
        """Of raw scores."""
        return self._runners[model].dtype

    def rows(self, places: Row[Place]) -> list[int]:
        """Where the store keeps the scores of each place."""
        index = self._store.index
        return [
            index(s.prompt_slot if position < s.num_prompt else s.slot, position)
            for s, position in places
        ]


def _is_open(sequence: Sequence, position: int) -> bool:
    """May its scores still decide something?"""
    return sequence.slot >= 0 and position >= sequence.first_open

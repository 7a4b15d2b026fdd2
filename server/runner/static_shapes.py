"""Forwards of few shapes: the tensors of a step are padded into buffers that never move.

A captured CUDA graph runs the same kernels on the same memory again, so whatever changes from step
to step has to be written into that memory first. Nothing here needs a GPU.

A span shorter than its shape is filled up with copies of its last token, and a batch smaller than
its shape with spans of one token over page 0. A copy looks at what the token looks at and writes
the same KV to the same slot: slot 0, which masked keys are read from, must stay finite, so nothing
that comes of a sequence may go there. The logits of padding are dropped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from server.cache.drafted import known_ids
from server.runner.base import Batch
from server.runner.grouping import MAX_GROUPED_TOKENS
from server.runner.plan import (
    ForwardPlan,
    Group,
    KeySelection,
    Paging,
    page_slots,
)

_QUERY_LENGTHS = (1, 2, 3, 5, 9, MAX_GROUPED_TOKENS)
# Between those, for batches whose padding to the next of those is not free.
_FINER_LENGTHS = (4, 6, 7)
# A forward of fewer rows takes a GPU as long as reading the weights does.
_FREE_ROWS = 128
# Of larger ones, no more than this multiple of the tokens fed.
_MOST_PADDING = 2
# Forwards of one shape that may be enqueued before the host waits for the first of them.
_MAX_HOST_BUFFERS = 16

Array = TypeVar("Array", Tensor, np.ndarray)


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """Of a padded forward: `batch` spans of `num_tokens` tokens each."""

    batch: int
    num_tokens: int

    @property
    def num_rows(self) -> int:
        return self.batch * self.num_tokens


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes a step is padded to.

    Attributes:
        batches: ascending.
        lengths: of each of the batches, ascending; all end with the same.
        max_step_tokens: the most tokens a step has.
    """

    batches: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    max_step_tokens: int

    @property
    def longest(self) -> int:
        return self.lengths[-1][-1]

    @staticmethod
    def of(max_sequences: int, longest: int, max_step_tokens: int, usual: int) -> Shapes:
        """Sizes for up to `max_sequences` spans of up to `longest` tokens.

        `usual` is a number of tokens that is not to be padded: of scoring a whole proposal.
        """
        batches = {1, 2, 4, 8, max_sequences}
        size = 16
        while size < max_sequences:
            batches |= {size, size * 3 // 2}
            size *= 2
        longest = min(longest, MAX_GROUPED_TOKENS)
        coarse = {length for length in (*_QUERY_LENGTHS, usual) if length < longest} | {longest}
        fitting = tuple(sorted(batch for batch in batches if batch <= max_sequences))
        lengths = tuple(_lengths(batch, sorted(coarse)) for batch in fitting)
        return Shapes(fitting, lengths, max_step_tokens)

    def find(self, batch: Batch) -> Shape | None:
        """The smallest shape that holds `batch`; None where no shape does, or padding costs."""
        longest = max(len(span.token_ids) for span in batch.spans)
        if len(batch.spans) > self.batches[-1] or longest > self.longest:
            return None
        place = bisect_left(self.batches, len(batch.spans))
        lengths = self.lengths[place]
        shape = Shape(self.batches[place], lengths[bisect_left(lengths, longest)])
        if shape.num_rows > max(_FREE_ROWS, _MOST_PADDING * batch.num_tokens):
            return None
        return shape

    def all(self) -> list[Shape]:
        """Every shape some step needs, largest first."""
        found = []
        for i, batch in enumerate(self.batches):
            least_spans = self.batches[i - 1] + 1 if i else 1
            for j, length in enumerate(self.lengths[i]):
                least_tokens = self.lengths[i][j - 1] + 1 if j else 1
                # One span of the longest kind is enough to need the shape.
                if least_spans - 1 + least_tokens <= self.max_step_tokens:
                    found.append(Shape(batch, length))
        return sorted(found, key=lambda shape: (shape.num_rows, shape.batch), reverse=True)


def _lengths(batch: int, coarse: list[int]) -> tuple[int, ...]:
    """Of shapes of `batch` spans: `coarse`, ascending, and such as are worth a graph."""
    finer = [
        length
        for length in _FINER_LENGTHS
        if length < coarse[-1] and batch * coarse[bisect_left(coarse, length)] > _FREE_ROWS
    ]
    return tuple(sorted({*coarse, *finer}))


@dataclass(slots=True)
class StaticGroup(Group):
    """A whole padded batch, known to the device alone."""

    tables: Paging

    def paging(self) -> Paging:
        """See Group.paging."""
        return self.tables

    def is_whole(self, window: int) -> bool:
        """See Group.is_whole; not known, and of no use to few tokens."""
        return False

    def _select(self, window: int) -> KeySelection:
        """Every key the table has room for, most of them masked."""
        table, starts, lengths = self.tables.table, self.tables.starts, self.tables.lengths
        positions = torch.arange(table.shape[1] * self.page_size, device=self.device)
        positions = positions.expand(len(table), -1)
        last = lengths[:, None]
        tokens = torch.arange(self.num_tokens, device=self.device)
        queries = torch.minimum(starts[:, None] + tokens, last - 1)[:, :, None]
        allowed = positions[:, None, :] <= queries
        if window:
            allowed &= positions[:, None, :] > queries - window
        return KeySelection(page_slots(table, positions, last, self.page_size), allowed)


class _Views(NamedTuple, Generic[Array]):
    """Parts of the buffer of a shape of B spans of n tokens; int64, on the host or the device.

    Attributes:
        ids, positions, slots: [B, n], see ForwardPlan.
        keep: [B, n], row after row: those whose logits are wanted, and anything behind them.
        starts, lengths: [B], see Paging.
        table: [B, width], see Paging.
    """

    ids: Array
    positions: Array
    slots: Array
    keep: Array
    starts: Array
    lengths: Array
    table: Array


@dataclass(slots=True)
class _HostBuffer:
    """What is copied to the device, and when that has been done."""

    memory: Tensor
    views: _Views[np.ndarray]
    copied: torch.cuda.Event | None

    def is_free(self) -> bool:
        """The device has read it."""
        return self.copied is None or self.copied.query()

    def wait(self) -> None:
        """Until it is free."""
        if self.copied is not None:
            self.copied.synchronize()


@dataclass(slots=True)
class StaticBuffers:
    """Input of forwards of one shape: one tensor on the device, cut into views.

    The host's side of it is written while the device may still be about to read what was written
    for earlier forwards, so there are as many of those as it takes, up to a limit.

    Attributes:
        shape: of the forwards.
        max_length: of sequences, in tokens.
        page_size: in tokens.
        device: of the model.
    """

    shape: Shape
    max_length: int
    page_size: int
    device: torch.device
    _hosts: deque[_HostBuffer] = field(default_factory=deque, init=False)
    _device: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._device = torch.zeros(self._size, dtype=torch.int64, device=self.device)
        self.fill(Batch(()))

    @property
    def _width(self) -> int:
        """Pages of a table row."""
        return -(-self.max_length // self.page_size)

    @property
    def _size(self) -> int:
        return 4 * self.shape.num_rows + self.shape.batch * (2 + self._width)

    def _host(self) -> _HostBuffer:
        """One that the device does not read any more; they become free in the order of use."""
        oldest = self._hosts[0] if self._hosts else None
        if oldest is None or (not oldest.is_free() and len(self._hosts) < _MAX_HOST_BUFFERS):
            self._hosts.append(self._new_host())
        else:
            oldest.wait()
            self._hosts.rotate(-1)
        return self._hosts[-1]

    def _new_host(self) -> _HostBuffer:
        pinned = self.device.type == "cuda"
        memory = torch.zeros(self._size, dtype=torch.int64, pin_memory=pinned)
        views = _Views(*(view.numpy() for view in _cut(memory, self.shape, self._width)))
        return _HostBuffer(memory, views, torch.cuda.Event() if pinned else None)

    def fill(self, batch: Batch) -> Tensor:
        """Hold `batch`, padded.

        Returns:
            [batch.num_kept] int64, rows of the padded forward whose logits are wanted.
        """
        host = self._host()
        kept = _kept_rows(batch, self.shape.num_tokens)
        self._write(host.views, batch, kept)
        self._device.copy_(host.memory, non_blocking=True)
        if host.copied is not None:
            host.copied.record(torch.cuda.current_stream(self.device))
        views = _cut(self._device, self.shape, self._width)
        if batch.drafted is not None:
            views.ids.copy_(known_ids(views.ids, batch.drafted))
        return views.keep.view(-1)[: len(kept)]

    def _write(self, views: _Views[np.ndarray], batch: Batch, kept: list[int]) -> None:
        """The batch and its padding, see the module."""
        ids, positions, slots, keep, starts, lengths, table = views
        used = len(batch.spans)
        for row, span in enumerate(batch.spans):
            count = len(span.token_ids)
            past, width = span.num_past, -(-(span.num_past + count) // self.page_size)
            ids[row, :count] = span.token_ids
            ids[row, count:] = span.token_ids[-1]
            table[row, :width] = span.pages[:width]
            starts[row], lengths[row] = past, past + count
        # Spans of one token over page 0.
        starts[used:], lengths[used:], table[used:, 0], ids[used:] = 0, 1, 0, 0
        steps = np.arange(self.shape.num_tokens)
        np.minimum(starts[:, None] + steps, lengths[:, None] - 1, out=positions)
        pages = np.take_along_axis(table, positions // self.page_size, axis=1)
        np.multiply(pages, self.page_size, out=slots)
        slots += positions % self.page_size
        keep.reshape(-1)[: len(kept)] = kept

    def plan(self) -> ForwardPlan:
        """Of a forward of everything the buffers hold; keeps every row.

        Its tensors are views, so that it stays right when the buffers are filled again; what the
        portable attention derives from them does not, so ask anew for every forward.
        """
        views = _cut(self._device, self.shape, self._width)
        rows = self.shape.num_rows
        group = StaticGroup(
            slice(0, rows),
            self.shape.num_tokens,
            self.page_size,
            self.device,
            Paging(views.table, views.starts, views.lengths),
        )
        return ForwardPlan(
            token_ids=views.ids.view(1, rows),
            position_ids=views.positions.view(1, rows),
            slots=views.slots.view(rows),
            keep=None,
            groups=(group,),
            num_positions=self.max_length,
        )


def _kept_rows(batch: Batch, num_tokens: int) -> list[int]:
    """Of a forward of spans padded to `num_tokens`: those whose logits are wanted."""
    rows: list[int] = []
    for index, span in enumerate(batch.spans):
        end = index * num_tokens + len(span.token_ids)
        rows += range(end - span.num_kept, end)
    return rows


def _cut(memory: Tensor, shape: Shape, width: int) -> _Views[Tensor]:
    batch, rows = shape.batch, shape.num_rows
    sizes = [rows] * 4 + [batch] * 2 + [batch * width]
    parts = memory.split(sizes)
    ids, positions, slots, keep = (part.view(batch, shape.num_tokens) for part in parts[:4])
    starts, lengths, table = parts[4:]
    return _Views(ids, positions, slots, keep, starts, lengths, table.view(batch, width))

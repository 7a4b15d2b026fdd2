"""Everything one forward needs besides the weights, prepared once and shared by all layers.

The packed rows are the tokens of all spans, spans with equally many tokens side by side: such a
run of spans is a *group*, and attention takes a group at once. `keep` undoes the reordering.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.cache.drafted import known_ids
from server.cache.on_device import tensor_on
from server.runner.base import Batch, Span
from server.runner.grouping import packing_order, taken_together


@dataclass(frozen=True, slots=True)
class KeySelection:
    """What the queries of one group attend to, for one window.

    Attributes:
        slots: where the keys lie: a slice (one span, neighbouring pages) or [B, L] int64.
        allowed: [B, num_tokens, L] bool, may the query see the key; None: all of them.
    """

    slots: slice | Tensor
    allowed: Tensor | None


@dataclass(frozen=True, slots=True)
class SharedKeys:
    """Keys of a group whose sequences begin with the same pages, in two parts.

    Attributes:
        slots: of the common beginning, which every query sees: a slice or [1, S] int64.
        own: what follows it in each sequence.
    """

    slots: slice | Tensor
    own: KeySelection


@dataclass(frozen=True, slots=True)
class Paging:
    """Where the keys of a group's sequences lie, as tensors on the device.

    Attributes:
        table: [B, width] int64, pages of each sequence; entries beyond its tokens are any page.
        starts: [B] int64, position of the first query of each span.
        lengths: [B] int64, tokens of each sequence, the fed ones included.
    """

    table: Tensor
    starts: Tensor
    lengths: Tensor


@dataclass(slots=True)
class Group:
    """Spans with the same number of tokens, their rows consecutive in the packed batch.

    Attributes:
        rows: of the packed batch, num_spans * num_tokens of them.
        num_tokens: of each span.
    """

    rows: slice
    num_tokens: int
    page_size: int
    device: torch.device
    _selections: dict[int, KeySelection] = field(default_factory=dict, init=False)
    _biases: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False)

    @property
    def num_spans(self) -> int:
        return (self.rows.stop - self.rows.start) // self.num_tokens  # type: ignore[no-any-return]

    def paging(self) -> Paging:
        """For attention that reads the page table itself."""
        raise NotImplementedError

    def is_whole(self, window: int) -> bool:
        """Is it one span from the start of its sequence, of which all is within `window`?"""
        raise NotImplementedError

    def selection(self, window: int) -> KeySelection:
        """Keys within `window` tokens of the queries; 0 means all that came before."""
        if window not in self._selections:
            self._selections[window] = self._select(window)
        return self._selections[window]

    def shared(self) -> SharedKeys | None:
        """Keys in two parts, where the spans are together for their common beginning."""
        return None

    def alone(self) -> list[Group]:
        """Each span as a group of its own, its rows counted from this group's first."""
        raise NotImplementedError

    def bias(self, window: int, repeats: int, dtype: torch.dtype) -> Tensor | None:
        """What to add to the attention scores: 0 or -inf, [B, 1, repeats * num_tokens, L]."""
        return self._bias((window, repeats), self.selection(window).allowed, dtype)

    def own_bias(self, shared: SharedKeys, repeats: int, dtype: torch.dtype) -> Tensor:
        """`bias` for the keys that follow the common beginning."""
        bias = self._bias((-1, repeats), shared.own.allowed, dtype)
        assert bias is not None, "sequences of several lengths always need one"
        return bias

    def _bias(
        self, key: tuple[int, int], allowed: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        if allowed is None:
            return None
        repeats = key[1]
        if key not in self._biases:
            bias = torch.zeros(allowed.shape, dtype=dtype, device=self.device)
            bias.masked_fill_(~allowed, float("-inf"))
            self._biases[key] = bias.repeat(1, repeats, 1)[:, None]
        return self._biases[key]

    def _select(self, window: int) -> KeySelection:
        raise NotImplementedError


@dataclass(slots=True)
class SpanGroup(Group):
    """A group known to the host.

    Attributes:
        lengths: tokens of each sequence, the fed ones included.
        pages: page table of each sequence.
        num_shared: pages that all sequences begin with, before the fed tokens; 0: not known.
    """

    lengths: list[int]
    pages: list[Sequence[int]]
    num_shared: int = 0
    _paging: Paging | None = field(default=None, init=False)
    _shared: SharedKeys | None = field(default=None, init=False)
    _alone: list[SpanGroup] = field(default_factory=list, init=False)

    def paging(self) -> Paging:
        """See Group.paging."""
        if self._paging is None:
            starts = [length - self.num_tokens for length in self.lengths]
            table = [page for row in self._table() for page in row]
            count = len(starts)
            packed = tensor_on(self.device, [*starts, *self.lengths, *table])
            self._paging = Paging(
                table=packed[2 * count :].view(count, -1),
                starts=packed[:count],
                lengths=packed[count : 2 * count],
            )
        return self._paging

    def shared(self) -> SharedKeys | None:
        """See Group.shared."""
        if self._shared is None and self.num_shared:
            length = self.num_shared * self.page_size
            near = self._neighbouring(0, length)
            everywhere = torch.arange(length, device=self.device)[None]
            slots = self._slots(everywhere) if near is None else near
            positions = self._positions([length] * self.num_spans)
            own = KeySelection(self._slots(positions), self._allowed(positions, window=0))
            self._shared = SharedKeys(slots, own)
        return self._shared

    def alone(self) -> list[Group]:
        """See Group.alone."""
        if not self._alone:
            self._alone = [
                SpanGroup(
                    slice(number * self.num_tokens, (number + 1) * self.num_tokens),
                    self.num_tokens,
                    self.page_size,
                    self.device,
                    [length],
                    [pages],
                )
                for number, (length, pages) in enumerate(zip(self.lengths, self.pages, strict=True))
            ]
        return list(self._alone)

    def is_whole(self, window: int) -> bool:
        """See Group.is_whole."""
        return self.lengths == [self.num_tokens] and not window

    def _table(self) -> list[list[int]]:
        """Short tables are padded with page 0, which holds finite values nobody may see."""
        width = max(-(-length // self.page_size) for length in self.lengths)
        return [[*pages[:width], *[0] * (width - len(pages))] for pages in self.pages]

    def _select(self, window: int) -> KeySelection:
        oldest = [length - self.num_tokens - window + 1 if window else 0 for length in self.lengths]
        first = [max(0, position) for position in oldest]
        near = self._neighbouring(first[0], self.lengths[0]) if self.num_spans == 1 else None
        # One token of one span sees every key selected for it.
        everything = self.num_tokens == 1 and self.num_spans == 1
        if everything and near is not None:
            return KeySelection(near, None)
        positions = self._positions(first)
        slots = self._slots(positions) if near is None else near
        return KeySelection(slots, None if everything else self._allowed(positions, window))

    def _allowed(self, positions: Tensor, window: int) -> Tensor:
        """May the queries see keys at `positions` [B, L]? Bool [B, num_tokens, L]."""
        lengths = tensor_on(self.device, self.lengths)
        queries = (
            lengths[:, None] - self.num_tokens + torch.arange(self.num_tokens, device=self.device)
        )
        allowed = positions[:, None, :] <= queries[:, :, None]
        if window:
            allowed &= positions[:, None, :] > queries[:, :, None] - window
        return allowed

    def _positions(self, first: list[int]) -> Tensor:
        """[B, L]: the positions first[b], first[b] + 1, ... ; L is the longest span's need."""
        count = max(length - start for length, start in zip(self.lengths, first, strict=True))
        starts = tensor_on(self.device, first)
        return starts[:, None] + torch.arange(count, device=self.device)

    def _slots(self, positions: Tensor) -> Tensor:
        """[B, L] slots of `positions` [B, L], or of the first span where that is [1, L]."""
        table = tensor_on(self.device, self._table())[: len(positions)]
        last = tensor_on(self.device, self.lengths)[: len(positions), None]
        return page_slots(table, positions, last, self.page_size)

    def _neighbouring(self, first: int, length: int) -> slice | None:
        """Slots of positions [first, length) of the first span, if they are neighbours."""
        start = first // self.page_size
        end = -(-length // self.page_size)
        used = list(self.pages[0][start:end])
        if used != list(range(used[0], used[0] + len(used))):
            return None
        slot = used[0] * self.page_size + first % self.page_size
        return slice(slot, slot + length - first)


def page_slots(table: Tensor, positions: Tensor, lengths: Tensor, page_size: int) -> Tensor:
    """Slots [B, L] of positions [B, L] below `lengths` [B, 1]; slot 0 for the others."""
    page = table.gather(1, (positions // page_size).clamp(max=table.shape[1] - 1))
    return torch.where(positions < lengths, page * page_size + positions % page_size, 0)


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """Index tensors of one forward, T packed tokens.

    Attributes:
        token_ids, position_ids: [1, T] int64.
        slots: [T] int64, where each token's KV goes.
        keep: [num_kept] int64, packed rows whose logits are wanted, in the batch's order; None: all
            as they are.
        groups: cover the packed rows in order.
        num_positions: all of position_ids are below it.
    """

    token_ids: Tensor
    position_ids: Tensor
    slots: Tensor
    keep: Tensor | None
    groups: tuple[Group, ...]
    num_positions: int

    @property
    def num_rows(self) -> int:
        return self.token_ids.shape[1]

    def kept_rows(self) -> Tensor:
        """`keep`, written out where it is None."""
        if self.keep is None:
            return torch.arange(self.num_rows, device=self.token_ids.device)
        return self.keep


def make_plan(
    batch: Batch, page_size: int, device: torch.device, gathers: bool = False
) -> ForwardPlan:
    """Prepare a forward of `batch`; `gathers` as in ModelRunner."""
    order = packing_order(batch.spans, page_size, gathers)
    spans = [batch.spans[i] for i in order]
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    kept: dict[int, range] = {}
    for index, span in zip(order, spans, strict=True):
        token_ids += span.token_ids
        positions += range(span.num_past, span.num_past + len(span.token_ids))
        slots += _slots(span, page_size)
        kept[index] = range(len(token_ids) - span.num_kept, len(token_ids))
    keep = [row for index in range(len(spans)) for row in kept[index]]
    count = len(token_ids)
    # One copy to the device instead of four.
    packed = tensor_on(device, [*token_ids, *positions, *slots, *keep], torch.int64)
    return ForwardPlan(
        token_ids=known_ids(packed[None, :count], batch.drafted),
        position_ids=packed[None, count : 2 * count],
        slots=packed[2 * count : 3 * count],
        keep=packed[3 * count :],
        groups=tuple(_make_groups(spans, page_size, device, gathers)),
        num_positions=max(positions, default=-1) + 1,
    )


def num_attended(spans: Sequence[Span], page_size: int, gathers: bool) -> int:
    """Tokens consumed before the spans, those that are attended once for several counted once."""
    total = sum(span.num_past for span in spans)
    if not gathers or len(spans) < 2:
        return total
    alike = [spans[i] for i in packing_order(spans, page_size, gathers)]
    for together, num_shared in taken_together(alike, page_size, gathers):
        total -= (len(together) - 1) * num_shared * page_size
    return total


def _slots(span: Span, page_size: int) -> list[int]:
    positions = range(span.num_past, span.num_past + len(span.token_ids))
    return [span.pages[p // page_size] * page_size + p % page_size for p in positions]


def _make_groups(
    spans: list[Span], page_size: int, device: torch.device, gathers: bool
) -> list[SpanGroup]:
    groups: list[SpanGroup] = []
    first_row = 0
    for members, num_shared in taken_together(spans, page_size, gathers):
        num_tokens = len(members[0].token_ids)
        rows = slice(first_row, first_row + num_tokens * len(members))
        lengths = [span.num_past + num_tokens for span in members]
        pages = [span.pages for span in members]
        groups.append(SpanGroup(rows, num_tokens, page_size, device, lengths, pages, num_shared))
        first_row = rows.stop
    return groups

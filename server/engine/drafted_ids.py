"""Ids of proposed tokens that only a device knows: left there, fed from there, and read at last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Row
from itertools import islice

import torch
from torch import Tensor

from server.cache.drafted import known_ids, stored_ids
from server.cache.on_device import tensor_on
from server.core.sequence import Sequence
from server.core.unread import is_unread, unread
from server.decoding.warp import Place
from server.engine.scores import Scores
from server.runner.base import Span


class DraftedIds:
    """Of all sequences, in the rows of their scores, where tokens are decided."""

    def __init__(self, scores: Scores, num_rows: int, runs_ahead: bool) -> None:
        """Without `runs_ahead` none is ever left unread."""
        self._scores = scores
        self._runs_ahead = runs_ahead
        self._ids = torch.zeros(num_rows, dtype=torch.int64, device=scores.device)

    def leave(self, places: list[Place], tokens: Tensor) -> list[int]:
        """Keep `tokens`, int64 [len(places)], on the device; returns what stands for them."""
        rows = self._scores.rows(places)
        self._ids.index_copy_(0, tensor_on(self._ids.device, rows), tokens)
        return [unread(row) for row in rows]

    def for_model(self, model: int, device: torch.device, spans: Iterable[Span]) -> Tensor | None:
        """Int64 [num_rows] on the model's `device`; None where `spans` feed none that is unread."""
        if not self._runs_ahead:
            return None
        if not any(is_unread(token_id) for span in spans for token_id in span.token_ids):
            return None
        with self._scores.crossing(model):
            # A CPU would read the copy before it is there.
            return self._ids.to(device, non_blocking=device.type == "cuda")

    def tokens(self, places: list[Place]) -> Tensor:
        """Ids of the pending tokens at `places`, int64 on the device, unread ones included."""
        ids = tensor_on(self._ids.device, [s.token_ids[position] for s, position in places])
        return known_ids(ids, self._ids) if self._runs_ahead else ids

    @torch.inference_mode()
    def read_tail(self, sequence: Sequence) -> None:
        """Let the host know the pending tokens of `sequence`."""
        if sequence.has_unread:
            sequence.read(self._tails([sequence]).tolist())

    def read_with(self, decided: Tensor, sequences: Iterable[Sequence]) -> list[int]:
        """`decided`, int64 [N], and what is unread in `sequences`, in one copy from the device."""
        drafted = [s for s in sequences if s.has_unread] if self._runs_ahead else []
        if not drafted:
            return list(decided.tolist())
        read: list[int] = torch.cat([decided, self._tails(drafted)]).tolist()
        rest = iter(read[len(decided) :])
        for sequence in drafted:
            sequence.read(list(islice(rest, sequence.num_pending)))
        return read[: len(decided)]

    def _tails(self, sequences: Row[Sequence]) -> Tensor:
        """Ids of all their pending tokens, unread ones included, int64, one after the other."""
        tails = [s.token_ids[s.num_verified :] for s in sequences]
        ids = [token_id for tail in tails for token_id in tail]
        return stored_ids(tensor_on(self._ids.device, ids), self._ids)

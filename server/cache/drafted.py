"""Token ids on a device, some of which the host knows and some of which it has not read."""

from __future__ import annotations

import torch
from torch import Tensor

from server.core.unread import unread


def stored_ids(token_ids: Tensor, drafted: Tensor) -> Tensor:
    """`token_ids`, int64 of any shape, with those that are unread taken from `drafted`.

    `drafted`, int64 [rows], holds -1 where there was nothing to propose.
    """
    rows = (unread(0) - token_ids).clamp_min(0)
    return torch.where(token_ids <= unread(0), drafted[rows], token_ids)


def known_ids(token_ids: Tensor, drafted: Tensor | None) -> Tensor:
    """`stored_ids` as a model can be fed: some token or other where there was none to propose.

    What comes of it is dropped. Without `drafted` none of `token_ids` is unread.
    """
    if drafted is None:
        return token_ids
    return stored_ids(token_ids, drafted).clamp_min(0)

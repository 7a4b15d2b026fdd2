"""Bounds what is kept by what requests ask for: clients may ask for any number of combinations."""

from __future__ import annotations

from typing import Any

MAX_KEPT = 4096


def make_room(kept: dict[Any, Any]) -> None:
    """Forget all that is kept where one entry more would be too many."""
    if len(kept) >= MAX_KEPT:
        kept.clear()

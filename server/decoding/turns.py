"""Whose turn it is when sequences that are decoded together want several models."""

from __future__ import annotations

from collections.abc import Mapping


def next_model(wanted: Mapping[int, float]) -> int:
    """The one that most want, the earliest of several.

    The others wait until they are more, or those come to want what they do: so sequences that
    began at different times soon draft together and are scored together.

    Args:
        wanted: how many sequences want each model, or which share of them.
    """
    return max(sorted(wanted), key=lambda model: wanted[model])

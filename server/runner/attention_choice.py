"""Which attention serves groups of few tokens: torch's everywhere, Triton's kernels on a GPU."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Literal, cast

import torch

from server.errors import ConfigError
from server.runner.attention import ShortAttention

AttentionName = Literal["auto", "portable", "triton"]


def choose_attention(
    wanted: AttentionName, device: torch.device, report: Callable[[str], None]
) -> ShortAttention | None:
    """The kernels for groups of few tokens on `device`, or None for torch's operations.

    Args:
        wanted: `auto` takes Triton where it can run; `triton` insists on it.
        device: of the model.
        report: takes one line where `auto` has to do without Triton on a GPU.

    Raises:
        ConfigError: Triton is wanted, and cannot run here.
    """
    if wanted == "portable" or (wanted == "auto" and device.type != "cuda"):
        return None
    if (reason := _missing(device)) is None:
        return cast(ShortAttention, importlib.import_module("server.runner.triton_attention"))
    if wanted == "triton":
        raise ConfigError(f"engine.attention: triton cannot run on {device}: {reason}")
    report(f"attention on {device} is torch's own, slower for long texts: {reason}")
    return None


def _missing(device: torch.device) -> str | None:
    """What Triton lacks to run on `device`; its interpreter runs on the CPU."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU, or TRITON_INTERPRET=1 to be interpreted"
    return None

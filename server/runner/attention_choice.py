"""Which attention serves groups of few tokens: torch's everywhere, or kernels of the device's.

These are written in Triton for GPUs, and compiled by Numba for CPUs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Literal, cast

import torch

from server.errors import ConfigError
from server.runner.attention import ShortAttention
from server.simd import support

AttentionName = Literal["auto", "portable", "triton"]
CpuKernels = Literal["auto", "off", "on"]


def has_cpu_kernels(
    wanted: CpuKernels, device: torch.device, report: Callable[[str], None]
) -> bool:
    """Are the kernels of `server.simd` to be used for a model on `device`?

    Raises:
        ConfigError: they are wanted, and cannot run here.
    """
    if wanted == "off" or device.type != "cpu":
        return False
    if (reason := support.missing()) is None:
        return True
    if wanted == "on":
        raise ConfigError(f"engine.cpu_kernels: on, but they cannot run here: {reason}")
    report(f"no kernels on {device}, torch's own operations are slower: {reason}")
    return False


def choose_attention(
    wanted: AttentionName,
    device: torch.device,
    report: Callable[[str], None],
    cpu_kernels: bool = False,
) -> ShortAttention | None:
    """The kernels for groups of few tokens on `device`, or None for torch's operations.

    Where that is a GPU, torch's attention is told to do without cuDNN's.

    Args:
        wanted: `auto` takes Triton where it can run; `triton` insists on it.
        device: of the model.
        report: takes one line where `auto` has to do without Triton on a GPU.
        cpu_kernels: those are to be used on a CPU.

    Raises:
        ConfigError: Triton is wanted, and cannot run here.
    """
    if device.type == "cuda":
        # Torch prefers cuDNN's attention on some GPUs, which makes a plan for each length of a text
        # it has not seen, in tenths of a second, and keeps all of them.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if wanted == "portable":
        return None
    if wanted == "auto" and device.type != "cuda":
        return _module("simd_attention") if cpu_kernels else None
    if (reason := _missing(device)) is None:
        return _module("triton_attention")
    if wanted == "triton":
        raise ConfigError(f"engine.attention: triton cannot run on {device}: {reason}")
    report(f"attention on {device} is torch's own, slower for long texts: {reason}")
    return None


def _module(name: str) -> ShortAttention:
    """Imported late: what it is written in is not installed everywhere."""
    return cast(ShortAttention, importlib.import_module(f"server.runner.{name}"))


def _missing(device: torch.device) -> str | None:
    """What Triton lacks to run on `device`; its interpreter runs on the CPU."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU, or TRITON_INTERPRET=1 to be interpreted"
    return None

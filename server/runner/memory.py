"""How many pages of KV memory each model gets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from server.config import EngineConfig, parse_bytes
from server.errors import ConfigError
from server.runner import cgroup

# Share that `kv_memory: auto` takes of what scores leave; the rest is for activations and for what
# deciding makes of scores.
_AUTO_SHARE = {"cpu": 0.5, "cuda": 0.8}


@dataclass(frozen=True, slots=True)
class KvNeed:
    """What one model stores for a token, and where."""

    device: torch.device
    bytes_per_token: int


@dataclass(frozen=True, slots=True)
class ScoreNeed:
    """Bytes of the scores that one model gives a position, and where they are kept."""

    device: torch.device
    row_bytes: int


def left_by_scores(
    needs: Sequence[ScoreNeed], num_rows: int, free: Mapping[torch.device, int]
) -> dict[torch.device, int]:
    """What is left of `free` bytes once each model has `num_rows` rows of scores.

    Raises:
        ConfigError: nothing is left.
    """
    left = dict(free)
    for need in needs:
        left[need.device] -= num_rows * need.row_bytes
    for device, rest in left.items():
        if rest <= 0:
            raise ConfigError(
                f"scores of {num_rows} positions need {_mib(free[device] - rest)} on {device}, "
                f"{_mib(free[device])} are free; lower engine.max_sequences or decoding.max_gamma"
            )
    return left


def num_pages(
    needs: Sequence[KvNeed],
    engine: EngineConfig,
    max_length: int,
    free: Mapping[torch.device, int],
) -> int:
    """Pages of every model, page 0 included: all models hold the same number of tokens.

    Args:
        needs: of each model.
        engine: kv_memory, page_size and max_sequences.
        max_length: longest sequence, in tokens.
        free: bytes free on each device of `needs`, those of scores taken off.

    Raises:
        ConfigError: not even one sequence of `max_length` tokens fits.
    """
    per_sequence = -(-max_length // engine.page_size)
    page_bytes = dict.fromkeys(free, 0)
    for need in needs:
        page_bytes[need.device] += need.bytes_per_token * engine.page_size
    if engine.kv_memory == "auto":
        budget = {d: int(free[d] * _AUTO_SHARE.get(d.type, 0.5)) for d in free}
        affordable = min(budget[d] // page_bytes[d] for d in free)
        available = min(budget.values())
    else:
        available = parse_bytes(engine.kv_memory)
        affordable = available // sum(page_bytes.values())
    # Page 0 holds no sequence.
    pages = min(affordable, 1 + engine.max_sequences * per_sequence)
    if pages < 1 + per_sequence:
        needed = (1 + per_sequence) * sum(page_bytes.values())
        raise ConfigError(_too_little(needed, available, max_length, engine))
    _check_fits(pages, page_bytes, free, engine)
    return pages


def _too_little(needed: int, available: int, max_length: int, engine: EngineConfig) -> str:
    return (
        f"KV memory of one sequence of {max_length} tokens is {_mib(needed)}, available are "
        f"{_mib(available)} (engine.kv_memory: {engine.kv_memory}); lower engine.max_length or "
        "raise engine.kv_memory"
    )


def _check_fits(
    pages: int,
    page_bytes: Mapping[torch.device, int],
    free: Mapping[torch.device, int],
    engine: EngineConfig,
) -> None:
    for device, available in free.items():
        needed = pages * page_bytes[device]
        if needed > available:
            raise ConfigError(
                f"engine.kv_memory {engine.kv_memory} needs {_mib(needed)} on {device}, "
                f"{_mib(available)} are free besides scores; lower engine.kv_memory"
            )


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`."""
    if device.type == "cuda":
        # Loading leaves much behind that torch would keep for itself: weights that were joined.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    machine, container = _free_of_machine(), cgroup.free_bytes()
    return machine if container is None else min(machine, container)


def _free_of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    # What is free isn't known everywhere; half of what is there is a guess on the safe side.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

"""What the control group (v2) of this process leaves it: a container has less than its machine."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path("/sys/fs/cgroup")


def free_bytes(folder: Path = _FOLDER) -> int | None:
    """Memory that can still be taken; None: as much as the machine has."""
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such group, or "max"
        return None
    # Pages of files that were read, such as weights, count as used until somebody wants them.
    statistics = dict(line.split() for line in lines)
    return max(0, limit - used + int(statistics.get("inactive_file", 0)))


def num_cpus(folder: Path = _FOLDER) -> int | None:
    """Whole cores that may be busy at once; None: all that the machine has."""
    try:
        quota, period = map(int, (folder / "cpu.max").read_text().split())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    return max(1, quota // period)

"""What the control groups (v2) of this process leave it: a container has less than its machine."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def free_bytes(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Memory that can still be taken; None: as much as the machine has."""
    found = [_free_bytes(folder) for folder in _folders(root, membership)]
    return min((free for free in found if free is not None), default=None)


def num_cpus(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Whole cores that may be busy at once; None: all that the machine has."""
    found = [_num_cpus(folder) for folder in _folders(root, membership)]
    return min((count for count in found if count is not None), default=None)


def _folders(root: Path, membership: Path) -> list[Path]:
    """Of the group of this process and of those that hold it: each of them limits it.

    In a container that sees no others its own group is the root.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return [root]
    group = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    folder = root / group
    above = [parent for parent in folder.parents if parent.is_relative_to(root)]
    return [folder, *above]


def _free_bytes(folder: Path) -> int | None:
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such group, or "max"
        return None
    # Pages of files that were read, such as weights, count as used until somebody wants them.
    statistics = dict(line.split() for line in lines)
    return max(0, limit - used + int(statistics.get("inactive_file", 0)))


def _num_cpus(folder: Path) -> int | None:
    try:
        quota, period = map(int, (folder / "cpu.max").read_text().split())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    return max(1, quota // period)

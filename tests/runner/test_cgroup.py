from __future__ import annotations

from pathlib import Path

import pytest

from server.runner import cgroup


def group(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("limit", "used", "statistics", "expected"),
    [
        ("1000", "400", "anon 300\ninactive_file 0", 600),
        ("1000", "900", "anon 300\ninactive_file 500\nactive_file 100", 600),
        ("1000", "1200", "anon 1200", 0),
        ("max", "400", "anon 300", None),
    ],
)
def test_memory(
    tmp_path: Path, limit: str, used: str, statistics: str, expected: int | None
) -> None:
    files = {"memory_max": limit, "memory_current": used, "memory_stat": statistics}
    assert cgroup.free_bytes(group(tmp_path, **files), tmp_path / "none") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("max 100000", None),
    ],
)
def test_cores(tmp_path: Path, text: str, expected: int | None) -> None:
    assert cgroup.num_cpus(group(tmp_path, cpu_max=text), tmp_path / "none") == expected


def test_no_group(tmp_path: Path) -> None:
    assert cgroup.free_bytes(tmp_path, tmp_path / "none") is None
    assert cgroup.num_cpus(tmp_path, tmp_path / "none") is None


def test_groups_within_groups(tmp_path: Path) -> None:
    """The tightest limit counts, of the process's own group or of one that holds it."""
    membership = tmp_path / "membership"
    membership.write_text("1:name=systemd:/elsewhere\n0::/service/worker\n")
    root = tmp_path / "root"
    (root / "service" / "worker").mkdir(parents=True)
    memory = {"memory_current": "100", "memory_stat": "anon 100"}
    group(root / "service", memory_max="1000", cpu_max="300000 100000", **memory)
    assert cgroup.free_bytes(root, membership) == 900
    assert cgroup.num_cpus(root, membership) == 3
    group(root / "service" / "worker", memory_max="500", cpu_max="200000 100000", **memory)
    assert cgroup.free_bytes(root, membership) == 400
    assert cgroup.num_cpus(root, membership) == 2
    membership.write_text("0::/\n")  # what a container with a view of its own reads
    group(root, memory_max="300", **memory)
    assert cgroup.free_bytes(root, membership) == 200

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
    assert cgroup.free_bytes(group(tmp_path, **files)) == expected


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
    assert cgroup.num_cpus(group(tmp_path, cpu_max=text)) == expected


def test_no_group(tmp_path: Path) -> None:
    assert cgroup.free_bytes(tmp_path) is None
    assert cgroup.num_cpus(tmp_path) is None

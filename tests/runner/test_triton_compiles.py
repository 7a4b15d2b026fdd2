"""The kernels compile for GPUs, whether or not one is there; the interpreter can't show that."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
# What a program gets on the smallest GPUs since compute capability 8.0.
SHARED_BYTES = 99 << 10


def test_kernels_compile(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_kernels"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    binaries = [line.split() for line in done.stdout.splitlines()]
    kernels = [(kernel, architecture) for kernel, architecture, *_ in binaries]
    names = ("_attend_split", "_combine_splits", "_attend_split", "_attend_split")
    assert kernels == [(name, "90") for name in names]
    for _, _, shared, size in binaries:
        assert int(shared) <= SHARED_BYTES
        assert int(size) > 0

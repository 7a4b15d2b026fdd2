"""Settings for all tests."""

from __future__ import annotations

import os

import pytest
import torch

# Triton's kernels run in its interpreter where no GPU is; it decides when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tiny models gain nothing from a second thread, and its barriers cost scheduler quanta whenever
# something else runs on the machine.
torch.set_num_threads(1)


# What takes longest. The soak comes first of all: it mostly waits while others run.
LONGEST = (
    "tests/soak/",
    "tests/engine/test_exactness.py",
    "tests/engine/",
    "tests/conformance/",
    "tests/gpu/",
    "tests/test_serve.py",
    "tests/test_readme.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no process is left with one at the end."""
    items.sort(key=lambda item: next((i for i, f in enumerate(LONGEST) if f in item.nodeid), 9))

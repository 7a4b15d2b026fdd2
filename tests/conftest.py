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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The soak first: it is the longest test, and mostly waits while others run beside it."""
    items.sort(key=lambda item: "tests/soak/" not in item.nodeid)

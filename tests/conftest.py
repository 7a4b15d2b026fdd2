"""Settings for all tests."""

from __future__ import annotations

import torch

# Tiny models gain nothing from a second thread, and its barriers cost scheduler quanta whenever
# something else runs on the machine.
torch.set_num_threads(1)

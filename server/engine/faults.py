"""Errors that a step survives, and what to do about memory.

An error in the path of one sequence ends that one; a step that does not fit into memory is given
up and made smaller (see `server.core.stats.Fault`). Everything else, such as a forward that fails,
ends the engine: nobody could say whose fault it is, or whether the device still works.
"""

from __future__ import annotations

import torch

# Where PyTorch has no class of its own for it.
_ALLOCATION_FAILED = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",  # the driver's own, of CUDA and of Triton
    "bad_alloc",
    "_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once might have gone well."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in _ALLOCATION_FAILED
    )


def free_cached_memory() -> None:
    """Give back what PyTorch keeps for later: the next attempt may need it in other sizes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Functions that only compiled code calls, by Numba.

What `torch.compile` makes of a model's layers is in `runner.compiled`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """`function`, compiled where a kernel first calls it.

    It cannot be called from Python: what that would take is compiled for each function and type,
    and was a fifth of the time that kernels take to compile.
    """
    return njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)

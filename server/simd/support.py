"""Can this machine run the kernels? Imports nothing that may be missing."""

from __future__ import annotations

import ctypes
import importlib
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

BITS = {torch.float32: 32, torch.bfloat16: 16}  # of numbers that kernels read; see `vectors.load`


@cache
def missing() -> str | None:
    """What this machine lacks for the kernels of `server.simd`; None: nothing."""
    try:
        numba = importlib.import_module("numba")
        features = importlib.import_module("llvmlite.binding").get_host_cpu_features()
    except Exception as error:  # of many kinds: another numpy, a library that cannot be loaded
        return f"Numba cannot be imported ({error})"
    if numba.config.CPU_NAME is not None or numba.config.CPU_FEATURES is not None:
        # LLVM ends the process where a kernel needs what that processor has not.
        return "NUMBA_CPU_NAME or NUMBA_CPU_FEATURES has Numba compile for another processor"
    if platform.machine().lower() in ("x86_64", "amd64") and not features.get("fma"):
        # Every single one would be a call of a C library's function, slower than torch by far.
        return "this processor has no fused multiply-add"
    try:
        team_function()
        barrier()
    except (OSError, AttributeError) as error:
        return f"torch's threads cannot be asked for ({error})"
    return None


@cache
def openmp() -> ctypes.CDLL:
    """The library with torch's threads, as torch itself finds it.

    A second one would have threads of its own, which wait for the cores that torch's keep busy.

    Raises:
        OSError: this build of torch has no such library.
    """
    libraries = Path(torch.__file__).parent / "lib"
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")
    found = [libraries / name for name in names if (libraries / name).exists()]
    if not found:
        raise OSError(f"no libtorch_cpu under {libraries}")
    # Looking a name up in a library looks through those that it was linked with.
    return ctypes.CDLL(str(found[0]))


@cache
def team_function() -> Any:
    """`GOMP_parallel(function, argument, num_threads, flags)`: run a function on each thread.

    GCC calls it where a parallel region begins, and the OpenMP libraries of other compilers have it
    for what GCC compiled.

    Raises:
        OSError, AttributeError: there is none here.
    """
    function = openmp().GOMP_parallel
    function.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def barrier() -> Any:
    """`GOMP_barrier()`: each thread of the team waits for all others.

    Raises:
        OSError, AttributeError: there is none here.
    """
    function = openmp().GOMP_barrier
    function.argtypes, function.restype = [], None
    return function

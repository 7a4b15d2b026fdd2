"""Functions that torch compiles once for every number of rows, or leaves as they are."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch._dynamo import config
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

logger = logging.getLogger(__name__)

# What torch.compile generates code with; needs a C++ compiler on a CPU, Triton on a GPU.
BACKEND: str | Callable[..., object] = "inductor"

_FAILURES = (TorchDynamoException, FailOnRecompileLimitHit)
# Each kind of layer is compiled twice, for one row and for several; all members share a limit. A
# thread knows only what was set in it.
_RECOMPILE_LIMIT = 64
_thread = threading.local()

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Compiled(Generic[Arguments, Result]):
    """A function in compiled form, whole: nothing of it is left to the interpreter.

    One object serves all layers: their weights are inputs of the code, not part of it. What is
    met for the first time is compiled in the call; where that fails, the function itself answers
    from then on. `function` may change its arguments.

    Attributes:
        run: the compiled form, which raises where that cannot be made.
        has_failed: the function itself answers.
    """

    def __init__(self, function: Callable[Arguments, Result]) -> None:
        """Compiles nothing yet.

        Raises:
            RuntimeError: torch.compile does not support this Python or platform.
        """
        _raise_limit()
        self._function = function
        self.run = torch.compile(function, fullgraph=True, dynamic=True, backend=BACKEND)
        self.has_failed = False

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """What the function gives."""
        if self.has_failed:
            return self._function(*args, **kwargs)
        _raise_limit()
        try:
            return self.run(*args, **kwargs)
        except _FAILURES as error:  # raised before anything has run
            self.has_failed = True
            logger.warning("a function is no longer compiled: %s", str(error).split("\n")[0])
            return self._function(*args, **kwargs)


def _raise_limit() -> None:
    """For this thread."""
    if not hasattr(_thread, "has_limit"):
        config.recompile_limit = max(config.recompile_limit, _RECOMPILE_LIMIT)
        _thread.has_limit = True

"""A GPU for each module here; where there is none, two that are played on the CPU."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.pretended_gpus.tensors import Gpus


@pytest.fixture(scope="module", autouse=True)
def gpus() -> Iterator[Gpus | None]:
    """None where they are real."""
    if torch.cuda.is_available():
        yield None
        return
    pytest.importorskip("triton")
    from tests.support.pretended_gpus import pretended_gpus

    with pretended_gpus() as pretended:
        yield pretended

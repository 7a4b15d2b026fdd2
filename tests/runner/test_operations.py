"""torch's operations between products: what they give, and as how many kernels of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from server.runner.operations import Heads, TorchOperations

EPS = 1e-6
# They launch nothing.
VIEWS = {"slice", "split_with_sizes", "to", "view"}


class Launches(TorchDispatchMode):
    """Names of the operations, one kernel each, or two where it copies its input first."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name not in VIEWS:
            if name in {"roll", "rms_norm"} and not args[0].is_contiguous():
                self.names.append("copy")
            self.names.append(name)
        return func(*args, **kwargs or {})


def make(norm: bool, num_rows: int, device: str = "cpu") -> tuple[Heads, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    heads = Heads(4, 2, 16, noise(6, 16) if norm else None, EPS, torch.bfloat16)
    return heads, noise(num_rows, 8, 16), noise(num_rows, 1, 16), noise(num_rows, 1, 16)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5])
@torch.inference_mode()
def test_queries_and_keys_are_normed_and_rotated(num_rows: int, norm: bool) -> None:
    heads, x, cos, sin = make(norm, num_rows)
    queries, keys, values = TorchOperations().rotation(heads)(x.clone(), cos, sin)
    expected = x[:, :6]
    if heads.norm is not None:
        expected = torch.nn.functional.rms_norm(expected, (16,), None, EPS) * heads.norm
    swapped = torch.cat((expected[..., 8:], expected[..., :8]), -1)
    expected = torch.addcmul(expected * cos, swapped, sin)
    assert torch.equal(torch.cat((queries, keys), 1), expected)
    assert torch.equal(values, x[:, 6:])


@pytest.mark.parametrize("norm", [False, True])
@torch.inference_mode()
def test_nothing_is_copied_before_it_is_rotated(norm: bool) -> None:
    heads, x, cos, sin = make(norm, 5, "meta")
    rotation = TorchOperations().rotation(heads)
    with Launches() as launches:
        rotation(x, cos, sin)
    assert launches.names == [*(["rms_norm", "mul"] if norm else []), "roll", "mul", "addcmul"]

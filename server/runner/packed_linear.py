"""Linear layers of float32 CPU models with their weights kept in 16 bits.

A forward over few tokens is bound by reading the weights, and half the bytes take less time.
Weights trained in bfloat16 or float16 mostly are float16 numbers already, so that nothing is lost;
activations, products and sums stay float32. A layer with a single weight that float16 cannot hold
exactly is left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` over a float16 weight in the layout of FBGEMM's kernel."""

    def __init__(self, linear: nn.Linear) -> None:
        """`linear` is float32 on the CPU and `is_exact`; it is copied, not kept.

        Raises:
            RuntimeError: this build of torch or this processor has no such kernel.
        """
        super().__init__()
        self.out_features = linear.out_features
        self._packed = torch.ops.quantized.linear_prepack_fp16(linear.weight, linear.bias)
        self._apply_packed = torch.ops.quantized.linear_dynamic_fp16

    def forward(self, x: Tensor) -> Tensor:
        """Float32 [..., in_features] -> [..., out_features]."""
        if x.numel() == 0:  # the kernel does not take it
            return x.new_empty(*x.shape[:-1], self.out_features)
        output: Tensor = self._apply_packed(x, self._packed)
        return output


def is_exact(weight: Tensor) -> bool:
    """Does float16 hold every number of `weight`?"""
    return bool(torch.equal(weight.half().float(), weight))


@torch.no_grad()
def pack_linears(model: nn.Module) -> tuple[int, int]:
    """Replace every plain nn.Linear of a float32 CPU `model` whose weight allows it.

    Returns:
        Weights packed and weights considered; none are packed where the kernel is missing.
    """
    packed = considered = 0
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear:  # quantised kinds derive from it
                continue
            considered += linear.weight.numel()
            if not is_exact(linear.weight):
                continue
            try:
                setattr(parent, name, PackedLinear(linear))
            except RuntimeError:
                return packed, considered
            packed += linear.weight.numel()
    return packed, considered

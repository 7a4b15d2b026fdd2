"""Linear layers and embeddings of float32 CPU models with their weights kept in 16 bits.

A forward over few tokens is bound by reading the weights, and half the bytes take less time.
Weights trained in bfloat16 or float16 mostly are float16 numbers already, so that nothing is lost;
activations, products and sums stay float32. A layer with a single weight that float16 cannot hold
exactly is left alone.
"""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
        # Whether the packed weight overrides torch functions is asked at every call, and finding
        # that it does not takes several times as long as calling the kernel.
        with torch._C.DisableTorchFunctionSubclass():
            output: Tensor = self._apply_packed(x, self._packed)
        return output


class HalfEmbedding(nn.Module):
    """An embedding kept in float16: only the rows looked up become float32.

    Besides a packed head that shares its table this is the only copy of it.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        """`embedding` is float32 and `is_exact`; it is copied, not kept."""
        super().__init__()
        # No parameter: transformers takes a model's dtype from the first of them.
        self.table = embedding.weight.detach().half()

    def forward(self, token_ids: Tensor) -> Tensor:
        """Int64 [...] -> float32 [..., dim]."""
        return F.embedding(token_ids, self.table).float()


def is_exact(weight: Tensor) -> bool:
    """Does float16 hold every number of `weight`?"""
    return bool(torch.equal(weight.half().float(), weight))


@dataclass(slots=True)
class PackingReport:
    """Weights of plain linear layers: all that were considered, and those now in 16 bits.

    `saved` are bytes of all that was packed, embeddings included, less than before.
    """

    packed: int = 0
    considered: int = 0
    saved: int = 0


@torch.no_grad()
def pack_linear(linear: nn.Linear, report: PackingReport) -> nn.Module:
    """The packed form of a float32 CPU layer, or the layer itself where there is none."""
    report.considered += linear.weight.numel()
    if not is_exact(linear.weight):
        return linear
    try:
        packed = PackedLinear(linear)
    except RuntimeError:
        return linear
    report.packed += linear.weight.numel()
    report.saved += 2 * linear.weight.numel()
    return packed


def pack_embedding(embedding: nn.Embedding, report: PackingReport, is_tied: bool) -> nn.Module:
    """The same table in float16 where that is exact, or `embedding` itself.

    `is_tied`: the head had the same table; packed, each has a copy of its own.
    """
    if not is_exact(embedding.weight):
        return embedding
    report.saved += (-2 if is_tied else 2) * embedding.weight.numel()
    return HalfEmbedding(embedding)


def pack_weights(model: nn.Module) -> PackingReport:
    """Pack every plain nn.Linear and nn.Embedding of a float32 CPU `model` that allows it."""
    report = PackingReport()
    tables = Tally(id(getattr(module, "weight", None)) for module in model.modules())
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            # Quantised kinds, and those that scale or shift, derive from the plain ones.
            if type(module) is nn.Linear:
                setattr(parent, name, pack_linear(module, report))
            elif type(module) is nn.Embedding and module.max_norm is None:
                is_tied = tables[id(module.weight)] > 1
                setattr(parent, name, pack_embedding(module, report, is_tied))
    return report

"""What layers do between their products: norms, rotation of queries and keys, the MLP's gate.

`TorchOperations` are torch's own, few and large; `simd_operations` are compiled for the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.runner.style import Style


class Norm(Protocol):
    """RMS norm of the last dimension, x / sqrt(mean(x ** 2) + eps) * weight.

    What it gives may be rounded to what the next product takes.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        ...

    def after_adding(self, x: Tensor, y: Tensor) -> Tensor:
        """The norm of x + y, which is left in `x`; both [T, D]."""
        ...


@dataclass(frozen=True, slots=True)
class Heads:
    """What a layer attends with.

    Attributes:
        num_heads, num_kv_heads: of queries; of keys, and as many of values.
        dim: of a head.
        norm: [num_heads + num_kv_heads, dim] weights of the norms of queries and keys, or None.
        eps: of these norms.
        dtype: of what is attended to.
    """

    num_heads: int
    num_kv_heads: int
    dim: int
    norm: Tensor | None
    eps: float
    dtype: torch.dtype


class Rotation(Protocol):
    """What a layer does to queries, keys and values before it attends."""

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated queries and keys, and values, [T, their heads, dim] each.

        Args:
            x: [T, heads of queries, keys and values, dim], which may be changed.
            cos: [T, 1, dim].
            sin: [T, 1, dim], negative in the first half.
        """
        ...


class Operations(Protocol):
    """Makes these for layers of one model."""

    def norm(self, weight: Tensor, eps: float) -> Norm:
        """`weight` [D]."""
        ...

    def rotation(self, heads: Heads) -> Rotation:
        """For one layer."""
        ...

    def gate(self, x: Tensor) -> Tensor:
        """The first half [T, D] of `x` [T, 2 D] through SiLU, times the second."""
        ...

    def add(self, x: Tensor, y: Tensor) -> None:
        """To `x`, both [T, D]."""
        ...


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What one decoder layer computes with, in this order; attention is between `style` and `out`.

    Attributes:
        attention_norm: of the states, [T, hidden].
        qkv: product of these; queries, keys and values side by side.
        rotation: of their heads.
        style: how they are attended.
        out: product of what attention found, to be added to the states.
        mlp_norm: of their sum.
        gate_up: product of these; the gate's two inputs side by side.
        down: product of what the gate gives, to be added to the states.
    """

    attention_norm: Norm
    qkv: nn.Module
    rotation: Rotation
    style: Style
    out: nn.Module
    mlp_norm: Norm
    gate_up: nn.Module
    down: nn.Module


class TorchOperations:
    """Operations in the fewest of torch's."""

    def norm(self, weight: Tensor, eps: float) -> Norm:
        """See Operations.norm."""
        return _norm(weight, eps)

    def rotation(self, heads: Heads) -> Rotation:
        """See Operations.rotation."""
        return _Rotation(heads)

    def gate(self, x: Tensor) -> Tensor:
        """See Operations.gate."""
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def add(self, x: Tensor, y: Tensor) -> None:
        """See Operations.add."""
        x += y


class _Rotation:
    """Of the pairs (i, i + dim / 2) of each head.

    A GPU copies what is not contiguous before it is rolled or normed. So values are as well, in
    the same kernels, and what comes of that is dropped.
    """

    def __init__(self, heads: Heads) -> None:
        self._queries_and_keys = (heads.num_heads, heads.num_kv_heads)
        self._num_rotated = heads.num_heads + heads.num_kv_heads
        self._norm = None if heads.norm is None else _norm(_with_values(heads), heads.eps)
        self._dtype = heads.dtype

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = x if self._norm is None else self._norm(x)
        rolled = normed.roll(x.shape[-1] // 2, -1)
        count = self._num_rotated
        rotated = torch.addcmul(normed[:, :count] * cos, rolled[:, :count], sin)
        queries, keys = rotated.to(self._dtype).split_with_sizes(self._queries_and_keys, 1)
        return queries, keys, x[:, count:].to(self._dtype)


def _with_values(heads: Heads) -> Tensor:
    """Weights of norms, with ones for values: [num_heads + 2 * num_kv_heads, dim]."""
    assert heads.norm is not None
    return torch.cat((heads.norm, heads.norm.new_ones(heads.num_kv_heads, heads.dim)))


def _norm(weight: Tensor, eps: float) -> Norm:
    """In few operations on the CPU, where torch's own is seven; in 16 bits they would lose more."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return _PlainNorm(weight, eps)
    return _FusedNorm(weight, eps)


class _PlainNorm:
    """x / hypot(|x|, sqrt(D eps)) * sqrt(D) w: four operations."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        """`weight` [..., D]."""
        size = weight.shape[-1]
        self._weight = weight * math.sqrt(size)
        self._floor = torch.tensor(math.sqrt(size * eps))

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / torch.hypot(length, self._floor)).mul_(self._weight)

    def after_adding(self, x: Tensor, y: Tensor) -> Tensor:
        x += y
        return self(x)


class _FusedNorm:
    """torch's own, one kernel on a GPU, sums in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        """`weight` [..., D]."""
        self._weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        size = self._weight.shape[-1:]
        if self._weight.dim() == 1:
            return F.rms_norm(x, size, self._weight, self._eps)
        return F.rms_norm(x, size, None, self._eps) * self._weight

    def after_adding(self, x: Tensor, y: Tensor) -> Tensor:
        x += y
        return self(x)

"""Linear layers and embeddings of CPU models, their weights laid out for kernels.

A forward over few tokens is bound by reading the weights, and half the bytes take less time.
Weights that come from bfloat16 or float16 are float16 numbers times a power of two, so that
float32 models lose nothing: activations, products and sums stay float32, and a layer with a single
weight that is no such number keeps all of them in 32 bits. Models in bfloat16 round the activations
too. A forward over many tokens is bound by arithmetic, and processors multiply twice as many of
those in a second.
"""

from __future__ import annotations

import math
from collections import Counter as Tally
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Up to which FBGEMM's products take less time than oneDNN's, roughly, for they round nothing:
# `python -m server.bench.linear`.
_FEW_ROWS = 8

# oneDNN makes a kernel for every number of rows it meets, some 600 KB each, and keeps a thousand.
# Up to this many rows each number has its own, and from there on every doubling has four.
_OWN_ROWS = 8
_STEPS_LOG2 = 2

_END = 16  # float16 numbers are below 2 ** _END
_MAX_EXPONENT = 64  # of what weights are multiplied by: far from where float32 ends


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` over a float16 weight in the layout of FBGEMM's kernel.

    The weight may be multiplied by a power of two, and so is what it gives: that rounds nothing.
    """

    def __init__(self, linear: nn.Linear, exponent: int = 0) -> None:
        """`linear` is float32 on the CPU, `exponent` its weight's; it is copied, not kept.

        Raises:
            RuntimeError: this build of torch or this processor has no such kernel.
        """
        super().__init__()
        self.out_features = linear.out_features
        self._scale = 2.0**-exponent
        weight, bias = (
            None if part is None else part.detach() * 2.0**exponent if exponent else part
            for part in (linear.weight, linear.bias)
        )
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self._apply_packed = torch.ops.quantized.linear_dynamic_fp16

    def forward(self, x: Tensor) -> Tensor:
        """Float32 [..., in_features] -> [..., out_features]."""
        if x.numel() == 0:  # the kernel does not take it
            return x.new_empty(*x.shape[:-1], self.out_features)
        # Whether the packed weight overrides torch functions is asked at every call, and finding
        # that it does not takes several times as long as calling the kernel.
        with torch._C.DisableTorchFunctionSubclass():
            output: Tensor = self._apply_packed(x, self._packed)
        return output if self._scale == 1 else output.mul_(self._scale)


class Float32Linear(nn.Module):
    """`x @ weight.T + bias` over a float32 weight in the layout of oneDNN's kernel."""

    def __init__(self, linear: nn.Linear) -> None:
        """`linear` is float32 on the CPU; it is copied, not kept.

        Raises:
            RuntimeError: this build of torch has no such kernel.
        """
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight)
        self._bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Float32 [..., in_features] -> [..., out_features]."""
        return _multiply(x, self._packed, self._bias)


class BFloat16Linear(nn.Module):
    """`x @ weight.T + bias` of a bfloat16 weight, summed in float32.

    oneDNN's kernel multiplies bfloat16 numbers, for many rows in half the time; FBGEMM's reads
    weights faster, for few, if float16 holds them. So as not to lay out a weight anew for every
    product, each kernel has its own copy.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """`linear` is bfloat16 on the CPU; it is copied, not kept.

        Raises:
            RuntimeError: this build of torch or this processor has no such kernel.
        """
        super().__init__()
        self._most_numbers = _FEW_ROWS * linear.in_features
        exponent = half_exponent(linear.weight)
        self._few = None if exponent is None else PackedLinear(widened(linear), exponent)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight)
        self._bias = linear.bias

    @property
    def num_copies(self) -> int:
        """Of the weight."""
        return 1 if self._few is None else 2

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] of any type -> [..., out_features] of the same, rounded at most."""
        if self._few is not None and x.numel() <= self._most_numbers:
            return self._few.forward(x.float()).to(x.dtype)
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """The same by oneDNN, however few rows there are."""
        return _multiply(x.bfloat16(), self._packed, self._bias).to(x.dtype)


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """[..., in_features] times a weight in oneDNN's layout."""
    if torch.compiler.is_compiling():  # the number of rows is a symbol there
        return _apply_packed(x, packed, bias)
    rows = x.reshape(-1, x.shape[-1])
    if missing := padded_rows(len(rows)) - len(rows):
        rows = F.pad(rows, (0, 0, 0, missing))
    output = _apply_packed(rows, packed, bias)
    if missing:
        output = output[: len(output) - missing]
    return output.view(*x.shape[:-1], output.shape[-1])


def _apply_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    # Nothing is fused behind the product.
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return output


def padded_rows(num_rows: int) -> int:
    """How many rows oneDNN is given for so many: at most a quarter more."""
    if num_rows <= _OWN_ROWS:
        return num_rows
    step = 1 << ((num_rows - 1).bit_length() - 1 - _STEPS_LOG2)
    return -(-num_rows // step) * step


def widened(linear: nn.Linear) -> nn.Linear:
    """The same layer in float32."""
    wide = nn.Linear(linear.in_features, linear.out_features, device="meta")
    wide.weight = nn.Parameter(linear.weight.float(), requires_grad=False)
    bias = linear.bias
    wide.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
    return wide


def _multiplies_float32() -> bool:
    """Has this build of torch oneDNN's kernels?"""
    return bool(torch.backends.mkldnn.is_available())


def multiplies_bfloat16() -> bool:
    """Have processor and build what it takes? Elsewhere bfloat16 is slower than float32."""
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has_instructions and _multiplies_float32()


class HalfEmbedding(nn.Module):
    """An embedding kept in 16 bits: only the rows looked up become float32.

    Besides a packed head that shares its table this is the only copy of it.
    """

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        """`embedding` is float32, and `dtype` holds its numbers; it is copied, not kept."""
        super().__init__()
        # No parameter: transformers takes a model's dtype from the first of them.
        self.table = embedding.weight.detach().to(dtype)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Int64 [...] -> float32 [..., dim]."""
        return F.embedding(token_ids, self.table).float()


def is_exact(weight: Tensor, dtype: torch.dtype = torch.float16) -> bool:
    """Does `dtype` hold every number of `weight`?"""
    return bool(torch.equal(weight.to(dtype).to(weight.dtype), weight))


def half_exponent(weight: Tensor) -> int | None:
    """Find k so that float16 holds every number of `weight` times 2 ** k; 0 where that will do.

    float16 has more digits than bfloat16 and a narrower range, of which most lies below the
    largest number. None where no k will do.
    """
    if is_exact(weight):
        return 0
    largest = float(weight.detach().abs().max())
    if not 0 < largest < math.inf:
        return None
    exponent = _END - math.frexp(largest)[1]
    if abs(exponent) > _MAX_EXPONENT:
        return None
    kept = (weight.float() * 2.0**exponent).half().float() * 2.0**-exponent
    return exponent if torch.equal(kept, weight.float()) else None


@dataclass(slots=True)
class PackingReport:
    """Weights of plain linear layers: all that were considered, and those now in 16 bits.

    `saved` are bytes of all that was laid out anew, embeddings included, less than before.
    """

    packed: int = 0
    considered: int = 0
    saved: int = 0


@torch.no_grad()
def pack_linear(linear: nn.Linear, report: PackingReport, kernels: bool = False) -> nn.Module:
    """The packed form of a CPU layer, or the layer itself where there is none.

    Args:
        linear: float32 or bfloat16.
        report: is told of it.
        kernels: those of `server.simd` can run here.

    Raises:
        RuntimeError: the layer is bfloat16, and this processor has no kernel for it.
    """
    report.considered += linear.weight.numel()
    if kernels and multiplies_in_kernels(linear.weight.dtype):
        packed = _pack_for_kernels(linear, report)
        if packed is not None:
            return packed
    if linear.weight.dtype != torch.bfloat16:
        return _pack_float32(linear, report)
    packed = BFloat16Linear(linear)
    report.saved -= 2 * (packed.num_copies - 1) * linear.weight.numel()
    report.packed += linear.weight.numel()
    return packed


def _pack_for_kernels(linear: nn.Linear, report: PackingReport) -> nn.Module | None:
    """None where the kernels do not take so many inputs."""
    from server.runner.simd_linear import SimdLinear, supports  # needs what may be missing

    weight, exponent = linear.weight.detach(), None
    if weight.dtype == torch.float32 and (exponent := half_exponent(weight)) is not None:
        weight = (weight * 2.0**exponent).half()
    if not supports(weight):
        return None
    saved = linear.weight.itemsize - weight.itemsize
    report.saved += saved * weight.numel()
    report.packed += weight.numel() if weight.itemsize == 2 else 0
    return SimdLinear(weight, linear.bias, exponent or 0)


def _pack_float32(linear: nn.Linear, report: PackingReport) -> nn.Module:
    exponent = half_exponent(linear.weight)
    if exponent is not None:
        try:
            packed = PackedLinear(linear, exponent)
        except RuntimeError:  # FBGEMM is not for every processor
            return _laid_out(linear)
        report.saved += 2 * linear.weight.numel()
        report.packed += linear.weight.numel()
        return packed
    return _laid_out(linear)


def _laid_out(linear: nn.Linear) -> nn.Module:
    return Float32Linear(linear) if _multiplies_float32() else linear


def multiplies_in_kernels(dtype: torch.dtype) -> bool:
    """Do this processor's registers hold what `server.simd.tiles` keeps in them?

    Where it has AMX, oneDNN is the faster one for bfloat16.
    """
    if dtype == torch.bfloat16:
        has_amx = torch.cpu._is_amx_tile_supported()
        return torch.cpu._is_avx512_bf16_supported() and not has_amx
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def pack_embedding(embedding: nn.Embedding, report: PackingReport, is_tied: bool) -> nn.Module:
    """The same table in 16 bits where that is exact, or `embedding` itself.

    `is_tied`: the head had the same table; laid out anew, each has a copy of its own.
    """
    table = embedding.weight
    is_kept = table.dtype == torch.bfloat16
    exact = [dtype for dtype in (torch.float16, torch.bfloat16) if is_exact(table, dtype)]
    if not is_kept and not exact:
        report.saved -= table.nbytes if is_tied and _multiplies_float32() else 0
        return embedding
    report.saved += (-2 if is_tied else table.itemsize - 2) * table.numel()
    return embedding if is_kept else HalfEmbedding(embedding, exact[0])


def pack_weights(model: nn.Module, kernels: bool = False) -> PackingReport:
    """Pack every plain nn.Linear and nn.Embedding of a CPU `model` that allows it.

    `model` is float32, or bfloat16 where the processor `multiplies_bfloat16`; `kernels` as those
    of `pack_linear`.
    """
    report = PackingReport()
    tables = Tally(id(getattr(module, "weight", None)) for module in model.modules())
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            # Quantised kinds, and those that scale or shift, derive from the plain ones.
            if type(module) is nn.Linear:
                setattr(parent, name, pack_linear(module, report, kernels))
            elif type(module) is nn.Embedding and module.max_norm is None:
                is_tied = tables[id(module.weight)] > 1
                setattr(parent, name, pack_embedding(module, report, is_tied))
    return report

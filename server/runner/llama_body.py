"""The forward of Llama-shaped models, written out: fewer and larger operations than transformers'.

On a CPU a small decoder spends a third of a forward between its matrix products, and a GPU waits
for the launches of all that. Here the projections that read the same input are one product, the
rotation of queries and keys is one, and the norms take four operations instead of eight, or one
kernel. transformers' own forward stays the reference: the self-check compares every model with it
before this one is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.runner.attention import PagedAttention
from server.runner.operations import Heads, LayerParts, Norm, Operations, TorchOperations
from server.runner.packed_linear import (
    HalfEmbedding,
    PackingReport,
    multiplies_bfloat16,
    pack_embedding,
    pack_linear,
    widened,
)
from server.runner.plan import ForwardPlan
from server.runner.style import Style

if TYPE_CHECKING:
    from server.runner.simd_layers import SimdLayers

_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}

# Rows that compiling is tried with beside a single one: like no size of a model, or the compiler
# would take the two for one.
_TRIED_ROWS = 7
# Positions whose angles are computed in one piece, which takes several times what is kept of them.
_ANGLES_IN_ONE_PIECE = 4096

Linear = Callable[[Tensor], Tensor]


def is_llama_shaped(model: PreTrainedModel) -> bool:
    """Is `model` a decoder that LlamaBody computes, of a type that is fast on its device?"""
    if model.config.model_type not in _MODEL_TYPES or not _is_fast(model.device, model.dtype):
        return False
    body: Any = model.base_model
    return (
        _names(model) == {"model", "lm_head"}
        and _names(body) == {"embed_tokens", "layers", "norm", "rotary_emb"}
        and type(body.embed_tokens) is nn.Embedding
        and type(model.lm_head) is nn.Linear
        and all(_is_llama_layer(layer, body.rotary_emb) for layer in body.layers)
    )


def _is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or dtype == torch.float32:
        return True
    return dtype == torch.bfloat16 and multiplies_bfloat16()


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_llama_layer(layer: Any, rotary: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        _names(layer) == _LAYER
        and _names(attention) in (_LINEARS, _LINEARS | _HEAD_NORMS)
        and _names(mlp) == _MLP | {"act_fn"}
        and all(type(getattr(attention, name)) is nn.Linear for name in _LINEARS)
        and all(type(getattr(mlp, name)) is nn.Linear for name in _MLP)
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and attention.head_dim == 2 * rotary.inv_freq.numel()
    )


class LlamaBody:
    """A runner's body: pre-norm layers of grouped-query attention and a gated SiLU MLP.

    Attributes:
        packing: how many of the weights are kept in 16 bits.
        head: states [n, hidden_size] -> logits [n, rows of the head].
        short_head: the same for the rows of a shortlist, float32 where `packed`; None without one.
        hidden_size: of the states.
        program: all of it as one program of kernels, where it is of nothing else.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        packed: bool,
        shortlist: Tensor | None = None,
        kernels: bool = False,
        max_length: int = 0,
    ) -> None:
        """Takes the weights over: `model` (which `is_llama_shaped`) cannot run afterwards.

        Args:
            model: its layers are taken out one by one, so that no second copy piles up.
            packed: keep a CPU's weights in 16 bits where that changes none, laid out for its
                kernels; a bfloat16 model's states, norms and activations are float32 then.
            shortlist: token ids [n] whose rows of the head are kept a second time.
            kernels: use those of `server.simd` for what is `packed`; they can run here.
            max_length: what attention rotates by is kept for positions below it, and computed anew
                in forwards beyond.
        """
        parts: Any = model
        body: Any = model.base_model
        self.packing = PackingReport()
        self._kernels = kernels and packed
        lay_out = self._packed if packed else _plain
        rotary = body.rotary_emb
        self._frequencies: Tensor = rotary.inv_freq.float()
        self._rope_scale = float(rotary.attention_scaling)
        self._types = _Types(torch.float32 if packed else model.dtype, model.dtype)
        operations = _operations(self._kernels, model.dtype)
        self._norm = _norm(body.norm, self._types.states, operations)
        self._layers: list[_Layer] = []
        is_tied = body.embed_tokens.weight is parts.lm_head.weight
        while len(body.layers):
            index, layer = len(self._layers), body.layers[0]
            self._layers.append(_Layer(index, layer, lay_out, self._types, operations))
            del body.layers[0]
        self.hidden_size: int = parts.lm_head.in_features
        self.short_head: Linear | None = None
        if shortlist is not None:
            rows = _rows(parts.lm_head, shortlist, widen=packed)
            self.packing.saved -= rows.weight.nbytes  # the model had no such copy
            self.short_head = lay_out(rows).forward
        head = lay_out(parts.lm_head)
        self.head: Linear = head.forward
        self._embed = (
            pack_embedding(body.embed_tokens, self.packing, is_tied)
            if packed
            else body.embed_tokens
        )
        body.embed_tokens = parts.lm_head = None
        self.program = self._written_as_program(head, model.dtype) if self._kernels else None
        # A program keeps its own.
        self._angles = self._kept_angles(max_length if self.program is None else 0)

    def __call__(self, plan: ForwardPlan, attention: PagedAttention) -> Tensor:
        """Logits [num_kept, rows of the head] of the model's type, or float32."""
        if self.program is not None and self.program.has_head and self.program.takes(attention):
            return self.program.logits(plan, attention.store)
        return self.head(self.states(plan, attention))

    def states(self, plan: ForwardPlan, attention: PagedAttention) -> Tensor:
        """What the head is applied to, [num_kept, hidden_size] of the model's type."""
        if self.program is not None and self.program.takes(attention):
            return self.program.states(plan, attention.store)
        x: Tensor = self._embed(plan.token_ids[0]).to(self._types.states)
        rope = self._angles_of(plan)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            # Of other rows than the kept ones, the last layer has to leave keys and values only.
            x = layer(x, rope, attention, plan.keep if index == last else None)
        return self._norm(x).to(self._types.model)

    @torch.inference_mode()
    def compile_layers(self) -> None:
        """Compile what layers do before and after attention, for any number of rows.

        Raises:
            Exception: of many kinds, where that cannot be done; nothing is compiled then.
        """
        from server.runner.compiled import Compiled  # loads a compiler that few want

        before = Compiled(_Layer.attention_inputs)
        after = Compiled(_Layer.add_outputs)
        for layer in self._layers:
            for num_rows in (_TRIED_ROWS, 1):
                rope = self._rope(torch.arange(num_rows, device=self._frequencies.device))
                x = rope[0].new_zeros(num_rows, self.hidden_size)
                queries, _, _ = before.run(layer, x, *rope)
                after.run(layer, x, queries.flatten(1).contiguous())
        for layer in self._layers:
            layer.before, layer.after = before, after

    def drop_compiled(self) -> None:
        """Run layers operation by operation again."""
        for layer in self._layers:
            layer.before, layer.after = _Layer.attention_inputs, _Layer.add_outputs

    def _written_as_program(self, head: nn.Module, dtype: torch.dtype) -> SimdLayers | None:
        """All layers as one program, where they are all of kernels."""
        from server.runner.simd_layers import Layer, SimdLayers  # needs what may be missing
        from server.runner.simd_linear import SimdLinear
        from server.runner.simd_operations import SimdNorm

        made = [Layer.of(layer.parts) for layer in self._layers]
        found = [layer for layer in made if layer is not None]
        if len(found) < len(made) or not isinstance(self._norm, SimdNorm):
            return None
        embed: Any = self._embed
        table = embed.table if isinstance(embed, HalfEmbedding) else embed.weight.detach()
        product = head if isinstance(head, SimdLinear) else None
        return SimdLayers(found, self._norm, dtype, table, self._rope, product)

    def _packed(self, linear: nn.Linear) -> nn.Module:
        return pack_linear(linear, self.packing, self._kernels)

    def _kept_angles(self, count: int) -> tuple[Tensor, Tensor]:
        """`_rope` of the first positions."""
        positions = torch.arange(count, device=self._frequencies.device)
        cos, sin = zip(*map(self._rope, positions.split(_ANGLES_IN_ONE_PIECE)), strict=True)
        return torch.cat(cos), torch.cat(sin)

    def _angles_of(self, plan: ForwardPlan) -> tuple[Tensor, Tensor]:
        """`_rope` of its positions: two kernels of a GPU where they are kept, else ten."""
        positions, (cos, sin) = plan.position_ids[0], self._angles
        if plan.num_positions > len(cos):
            return self._rope(positions)
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [T] -> cosines, signed sines [T, 1, head_dim] for `operations.Rotation`."""
        angles = positions[:, None, None] * self._frequencies
        cos, sin = angles.cos() * self._rope_scale, angles.sin() * self._rope_scale
        signed = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return signed[0].to(self._types.states), signed[1].to(self._types.states)


def _operations(kernels: bool, dtype: torch.dtype) -> Operations:
    if not kernels:
        return TorchOperations()
    from server.runner.simd_operations import SimdOperations  # needs what may be missing

    return SimdOperations(dtype)


def _rows(linear: nn.Linear, rows: Tensor, widen: bool) -> nn.Linear:
    """A layer with some of the outputs, which are copied.

    `widen`: to float32, for in 16 bits a token's score would depend on the rows scored beside it.
    """
    part = nn.Linear(linear.in_features, len(rows), bias=False, device="meta")
    part.weight = nn.Parameter(linear.weight[rows], requires_grad=False)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias[rows], requires_grad=False)
    return widened(part) if widen else part


def _plain(linear: nn.Linear) -> nn.Module:
    return linear


def _product(linear: nn.Module) -> Linear:
    """What `linear` computes; of kernels in float32, for what is done of it takes that as well."""
    product: Linear = getattr(linear, "product", linear.forward)
    return product


class _Types(NamedTuple):
    """Of numbers: the states of layers; and the model's own, of what is attended to and logits."""

    states: torch.dtype
    model: torch.dtype


class _Layer:
    """One decoder layer; x is [T, hidden].

    Attributes:
        before, after: `attention_inputs` and `add_outputs`, or compiled forms of them; functions
            of the layer, so that one compiled form serves all layers.
        parts: what it computes with.
    """

    def __init__(
        self,
        index: int,
        layer: Any,
        lay_out: Callable[[nn.Linear], nn.Module],
        types: _Types,
        operations: Operations,
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before: Callable[[_Layer, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
        self.after: Callable[[_Layer, Tensor, Tensor], None]
        self.before, self.after = _Layer.attention_inputs, _Layer.add_outputs
        self._index = index
        self._head_dim: int = attention.head_dim
        self.parts = parts = LayerParts(
            attention_norm=_norm(layer.input_layernorm, types.states, operations),
            qkv=lay_out(_join([attention.q_proj, attention.k_proj, attention.v_proj])),
            rotation=operations.rotation(_heads(attention, types)),
            style=Style(attention.scaling, _window(attention), None, None),
            out=lay_out(attention.o_proj),
            mlp_norm=_norm(layer.post_attention_layernorm, types.states, operations),
            gate_up=lay_out(_join([mlp.gate_proj, mlp.up_proj])),
            down=lay_out(mlp.down_proj),
        )
        self._attention_norm, self._mlp_norm = parts.attention_norm, parts.mlp_norm
        self._rotation, self._style = parts.rotation, parts.style
        self._qkv, self._out = _product(parts.qkv), _product(parts.out)
        self._gate_up, self._down = _product(parts.gate_up), _product(parts.down)
        self._gate, self._add = operations.gate, operations.add

    def __call__(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        attention: PagedAttention,
        keep: Tensor | None,
    ) -> Tensor:
        """Rows `keep` (None: all) of the layer's output; changes `x` in place."""
        queries, keys, values = self.before(self, x, *rope)
        attended = attention.attend(self._index, queries, keys, values, self._style)
        if keep is not None:
            x, attended = x.index_select(0, keep), attended.index_select(0, keep)
        if len(x):
            self.after(self, x, attended.flatten(1).contiguous())
        return x

    def attention_inputs(
        self, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, heads, head_dim], keys and values [T, kv_heads, head_dim]."""
        heads = self._qkv(self._attention_norm(x)).view(len(x), -1, self._head_dim)
        return self._rotation(heads, cos, sin)

    def add_outputs(self, x: Tensor, attended: Tensor) -> None:
        """To `x`: what attention found, [T, heads * head_dim], then what the MLP makes of both."""
        normed = self._mlp_norm.after_adding(x, self._out(attended))
        self._add(x, self._down(self._gate(self._gate_up(normed))))


def _window(attention: Any) -> int:
    """Of the layer; 0: none. Too long for the self-check to notice, so it has to be right here."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or 0
    # Mistral's layers read it off the config; Llama's ignore it wherever it stands.
    config = attention.config
    return (config.sliding_window or 0) if config.model_type == "mistral" else 0


def _norm(module: Any, dtype: torch.dtype, operations: Operations) -> Norm:
    return operations.norm(module.weight.to(dtype), module.variance_epsilon)


def _heads(attention: Any, types: _Types) -> Heads:
    dim: int = attention.head_dim
    num_heads = attention.q_proj.out_features // dim
    num_kv_heads = attention.k_proj.out_features // dim
    norm, eps = None, 0.0
    if hasattr(attention, "q_norm"):  # heads side by side, as queries and keys are
        rows = (
            attention.q_norm.weight.expand(num_heads, -1),
            attention.k_norm.weight.expand(num_kv_heads, -1),
        )
        norm, eps = torch.cat(rows).to(types.states), attention.q_norm.variance_epsilon
    return Heads(num_heads, num_kv_heads, dim, norm, eps, types.model)


def _join(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One product in place of several with the same input; their outputs lie side by side."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if any(linear.bias is not None for linear in linears):
        biases: list[Tensor] = [
            weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
            for linear in linears
        ]
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined

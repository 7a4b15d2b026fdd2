"""Writes a tiny Llama model as a GGUF file, the way llama.cpp's converter lays it out."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

NORMAL, CONTROL = 1, 3
_LAYER = {
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


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a Llama `model` and its byte-level BPE `tokenizer` in one file, in float32."""
    writer = gguf.GGUFWriter(path, "llama")
    _write_config(writer, model)
    _write_tokenizer(writer, tokenizer)
    _write_weights(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_config(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    special = set(tokenizer.all_special_tokens)
    merges = tokenizer.backend_tokenizer.to_str()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in special else NORMAL for token in tokens])
    writer.add_token_merges(_merges(merges))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.pad_token_id)  # some readers demand one
    writer.add_unk_token_id(tokenizer.pad_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def _merges(serialized: str) -> list[str]:
    return [" ".join(pair) for pair in json.loads(serialized)["model"]["merges"]]


def _write_weights(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    state = model.state_dict()
    writer.add_tensor("token_embd.weight", _array(state["model.embed_tokens.weight"]))
    writer.add_tensor("output_norm.weight", _array(state["model.norm.weight"]))
    writer.add_tensor("output.weight", _array(state["lm_head.weight"]))
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in _LAYER.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in heads:
                weight = _interleave(weight, heads[theirs])
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", _array(weight))


def _interleave(weight: Tensor, num_heads: int) -> Tensor:
    """Rotary halves of each head [.., 2, d/2] become pairs [.., d/2, 2], as llama.cpp has them."""
    return weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()

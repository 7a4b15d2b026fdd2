"""Tiny random transformers models and a byte-level tokenizer, saved as ordinary directories.

Everything is a function of its arguments: no download, the same bytes on every machine. Weights
are large enough for the distributions to be far from uniform.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 320
MAX_LENGTH = 512
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_WORDS = [
    "the",
    "and",
    "ing",
    "return",
    "for",
    "self",
    "in",
    "is",
    "of",
    "to",
    "def",
    "if",
    "not",
    "it",
    "data",
    "value",
    "number",
    "list",
]
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GQA = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 64}
_GEMMA = {**_GQA, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
# Sizes of each family beyond what every one shares; a key is a transformers model type.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "qwen2": {**_GQA, "tie_word_embeddings": True},
    "qwen3": {**_GQA, "head_dim": 16},
    "mistral": {**_GQA, "sliding_window": 8},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0},
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {**_GQA, "pad_token_id": None},
    "gpt_oss": {**_GQA, "head_dim": 16, "sliding_window": 8, "num_local_experts": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    # Known to be beyond this server: position bias in the mask, and recurrent state.
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def make_tokenizer(
    vocab_size: int = VOCAB_SIZE, marks: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` tokens: 256 bytes, merges, three special tokens, ChatML.

    `marks` are special tokens, too.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(itertools.islice(_merges(), vocab_size - len(alphabet) - 3 - len(marks)))
    tokens = [*alphabet, *(left + right for left, right in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START, *marks],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) == vocab_size
    return tokenizer


def _merges() -> Iterator[tuple[str, str]]:
    """Distinct merges, words first, then all pairs of lower-case letters."""
    seen: set[str] = set()
    words = ("Ġ" + word for word in _WORDS)
    pairs = (a + b for a in string.ascii_lowercase for b in string.ascii_lowercase)
    for text in itertools.chain(words, pairs):
        for end in range(2, len(text) + 1):
            if text[:end] not in seen:
                seen.add(text[:end])
                yield text[: end - 1], text[end - 1]


def make_model(
    family: str = "llama", seed: int = 0, vocab_size: int = VOCAB_SIZE, **settings: Any
) -> PreTrainedModel:
    """A random float32 model of `family`; `settings` override its config."""
    sizes = {"max_position_embeddings": MAX_LENGTH, "initializer_range": 0.3}
    ids = {"bos_token_id": None, "eos_token_id": VOCAB_SIZE - 3, "pad_token_id": VOCAB_SIZE - 2}
    merged = {**sizes, **ids, **FAMILIES[family], "vocab_size": vocab_size, **settings}
    config = AutoConfig.for_model(family, **merged)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id)
    return model.eval()


def make_model_dir(
    path: Path,
    family: str = "llama",
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    num_padding: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **settings: Any,
) -> Path:
    """Save a random model and its tokenizer under `path`.

    Args:
        path: directory to create.
        family: key of FAMILIES.
        seed: of the weights.
        vocab_size: tokens of the tokenizer.
        num_padding: embedding rows beyond the tokenizer, as Qwen2.5 checkpoints have.
        tokenizer: instead of `make_tokenizer(vocab_size)`.
        settings: entries of the model's config.

    Returns:
        `path`.
    """
    tokenizer = tokenizer or make_tokenizer(vocab_size)
    settings = {"eos_token_id": tokenizer.eos_token_id, **settings}
    model = make_model(family, seed, len(tokenizer) + num_padding, **settings)
    return _save(path, model, tokenizer)


def make_pair(path: Path, family: str = "llama", **settings: Any) -> tuple[Path, ...]:
    """Two members that share a vocabulary and largely agree; see `make_members`."""
    return make_members(path, 2, family, **settings)


def make_triple(path: Path, family: str = "llama", **settings: Any) -> tuple[Path, ...]:
    """Three members that share a vocabulary and largely agree; see `make_members`."""
    return make_members(path, 3, family, **settings)


def make_members(
    path: Path,
    count: int,
    family: str = "llama",
    noise: float = 0.05,
    marks: Sequence[str] = (),
    **settings: Any,
) -> tuple[Path, ...]:
    """Directories path/member-0, path/member-1, ...: one random model with different noise on it.

    Args:
        path: parent directory.
        count: number of members.
        family: key of FAMILIES.
        noise: relative size of the noise; 0 gives equal models, large values unrelated ones.
        marks: special tokens besides the usual ones.
        settings: entries of the models' config.
    """
    tokenizer = make_tokenizer(marks=marks)
    directories = []
    for member in range(count):
        model = make_model(family, 0, eos_token_id=tokenizer.eos_token_id, **settings)
        _add_noise(model, noise, seed=member)
        directories.append(_save(path / f"member-{member}", model, tokenizer))
    return tuple(directories)


def _add_noise(model: PreTrainedModel, noise: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            parameter += noise * parameter.abs().mean() * spread


def _save(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_pair_config(folder: Path, **engine: object) -> Path:
    """A pair in `folder`, and the configuration that contrasts them beside it."""
    models = [
        {"name": name, "path": str(path)}
        for name, path in zip(("amateur", "expert"), make_pair(folder), strict=True)
    ]
    config = {
        "served_model_name": "tiny",
        "models": models,
        "combination": {"method": "contrastive", "mu": 0.1},
        "engine": {"kv_memory": "64MiB", **engine},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path

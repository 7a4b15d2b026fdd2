"""Models of published shapes with random weights, and the ways the server has to run them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from server.cache.kv_store import KVStore
from server.runner.attention import ShortAttention
from server.runner.base import Batch, Span
from server.runner.graph_runner import GraphRunner
from server.runner.llama_body import LlamaBody, is_llama_shaped
from server.runner.static_shapes import Shapes
from server.runner.torch_runner import TorchRunner

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3 = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
# Sizes of each model, as published; the tiny ones prove that the benchmark runs.
SIZES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_LLAMA3,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
        "rope_parameters": _LLAMA3_ROPE,
    },
    "llama-3.2-1b": {
        **_LLAMA3,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
    },
    "tiny-expert": {
        "vocab_size": 320,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
    },
    "tiny-proposer": {
        "vocab_size": 320,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "intermediate_size": 128,
    },
}
PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Load:
    """What the forwards of a benchmark hold.

    Attributes:
        batch: most sequences.
        context: tokens each has consumed.
        extra: tokens each may consume beyond.
        longest: most tokens a sequence feeds in a decoding step.
    """

    batch: int
    context: int
    extra: int
    longest: int

    @property
    def max_length(self) -> int:
        return self.context + self.extra

    @property
    def pages_each(self) -> int:
        return -(-self.max_length // PAGE_SIZE)

    def batch_of(self, size: int, num_tokens: int, vocab_size: int) -> Batch:
        """`size` sequences that feed `num_tokens` each after the context, all logits wanted."""
        return Batch(
            tuple(
                Span(
                    pages=range(1 + i * self.pages_each, 1 + (i + 1) * self.pages_each),
                    num_past=self.context,
                    token_ids=[(7919 * i + 31 * j) % vocab_size for j in range(num_tokens)],
                    num_kept=num_tokens,
                )
                for i in range(size)
            )
        )


class Member:
    """One model of random weights on its device, to be run in one way after another."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        load: Load,
        kernels: ShortAttention | None,
    ) -> None:
        """`name` is a key of SIZES; `kernels` attend short queries in all ways but the first."""
        self.name = name
        self._load = load
        self._kernels = kernels
        config = LlamaConfig(**SIZES[name])
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self._model = model.eval().requires_grad_(False)
        self._body: LlamaBody | None = None
        self.vocab_size: int = config.vocab_size
        self.num_parameters: int = sum(p.numel() for p in self._model.parameters())
        embedding = self._model.get_input_embeddings().weight
        read = self.num_parameters - (0 if config.tie_word_embeddings else embedding.numel())
        self.bytes_read: int = read * embedding.element_size()
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        per_layer = 2 * config.num_key_value_heads * head_dim * embedding.element_size()
        self.kv_bytes_per_token: int = per_layer * config.num_hidden_layers

    def plain(self) -> TorchRunner:
        """Transformers' forward over paged KV, torch's attention; to be made before the others."""
        return self._runner(None, None)

    def fast(self) -> TorchRunner:
        """The forward written out, with the kernels; takes the weights over."""
        assert is_llama_shaped(self._model)
        self._body = LlamaBody(self._model, packed=False, max_length=self._load.max_length)
        return self._runner(self._body, self._kernels)

    @contextmanager
    def compiled(self, report: Callable[[str], None]) -> Iterator[bool]:
        """Within it the layers of `fast` are compiled; False where they cannot be."""
        assert self._body is not None
        started = time.perf_counter()
        try:
            self._body.compile_layers()
        except Exception as error:  # compilers fail in many ways
            reason = str(error).split("\n")[0]
            report(f"{self.name}: layers are not compiled: {reason}")
            yield False
            return
        report(f"{self.name}: compiled its layers, {time.perf_counter() - started:.1f} s")
        try:
            yield True
        finally:
            self._body.drop_compiled()

    def graphs(self, runner: TorchRunner, capture: bool) -> GraphRunner:
        """`runner` in padded shapes."""
        shapes = Shapes.of(self._load.batch, self._load.longest, 4096, self._load.longest)
        return GraphRunner(runner, shapes, capture)

    def _runner(self, body: LlamaBody | None, short: ShortAttention | None) -> TorchRunner:
        store = KVStore(1 + self._load.batch * self._load.pages_each, PAGE_SIZE)
        return TorchRunner(
            self.name,
            self._model,
            self.vocab_size,
            self._load.max_length,
            store,
            body,
            short_attention=short,
        )

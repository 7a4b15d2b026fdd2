"""Runs any decoder-only transformers model over paged KV memory, eagerly.

The body of a runner computes the logits of a plan: transformers' own forward, or one written out
for models of a known shape.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.cache.kv_store import KVStore
from server.runner.attention import PagedAttention, ShortAttention
from server.runner.base import Batch, DeferredScores
from server.runner.plan import ForwardPlan, make_plan


class Body(Protocol):
    """Weights and the order in which they are applied."""

    def __call__(self, plan: ForwardPlan, attention: PagedAttention) -> Tensor:
        """Logits [num_kept, rows of the head]; keys and values go through `attention`."""
        ...


class TransformersBody:
    """The forward that transformers has for the model, any architecture it lets us attend for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(self, plan: ForwardPlan, attention: PagedAttention) -> Tensor:
        """See Body; `attention` is attached to the model."""
        output = self._model(
            input_ids=plan.token_ids,
            position_ids=plan.position_ids,
            use_cache=False,
            logits_to_keep=0 if plan.keep is None else plan.keep,  # 0: all
        )
        logits: Tensor = output.logits[0]
        return logits


class TorchRunner:
    """A ModelRunner; see its attributes. Not thread-safe: one thread at a time may forward.

    `forward` is prepare, then run: all index tensors are made before the first layer, and
    running them reads nothing back to the host.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        vocab_size: int,
        max_length: int,
        store: KVStore,
        body: Body | None = None,
        weight_bytes: int = 0,
        short_attention: ShortAttention | None = None,
    ) -> None:
        """`model` is in eval mode on its device; it attends through this runner from now on.

        Args:
            name: of the configured member.
            model: read for its config, device and dtype, and run unless `body` is given.
            vocab_size: logits are cut to it.
            max_length: in tokens.
            store: KV memory.
            body: computes the logits instead of `model`.
            weight_bytes: memory of the weights, for whoever asks.
            short_attention: attends groups of few tokens instead of torch.
        """
        self.name = name
        self.model = model
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.weight_bytes = weight_bytes
        self.deferred: DeferredScores | None = None
        self._attention = PagedAttention(store, short_attention)
        if body is None:
            self._attention.attach(model)
        self._body = body or TransformersBody(model)

    @property
    def store(self) -> KVStore:
        return self._attention.store

    @store.setter
    def store(self, store: KVStore) -> None:
        """Exchange the KV memory; everything consumed so far is forgotten."""
        self._attention.store = store

    @property
    def attends_with_kernels(self) -> bool:
        """Are groups of few tokens attended by something else than torch's operations?"""
        return self._attention.short is not None

    @property
    def gathers(self) -> bool:
        """See ModelRunner.gathers."""
        return self.device.type == "cpu" and self._attention.short is None

    @property
    def kernels_declined(self) -> bool:
        """Have kernels left a group of few tokens to torch's operations?"""
        return self._attention.declined

    def longest_attended(self) -> int:
        """Tokens of a span that kernels attend; the model has run."""
        if self._attention.short is None:
            return 0
        config: Any = self.model.config.get_text_config()
        num_kv_heads, dim = self.store.slots(0)[0].shape[1:]
        heads = config.num_attention_heads // num_kv_heads
        return self._attention.short.max_tokens(heads, dim, self.dtype.itemsize)

    def drop_kernels(self) -> None:
        """Attend with torch's operations only."""
        self._attention.short = None

    @property
    def page_size(self) -> int:
        return self.store.page_size

    @property
    def num_pages(self) -> int:
        return self.store.num_pages

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """See ModelRunner.forward."""
        return self._logits(self.plan(batch))

    def plan(self, batch: Batch) -> ForwardPlan:
        """Prepare a forward of `batch`."""
        return make_plan(batch, self.page_size, self.device, self.gathers)

    @torch.inference_mode()
    def run(self, plan: ForwardPlan) -> Tensor:
        """A prepared forward: logits [num_kept, vocab_size]."""
        return self._logits(plan)

    def _logits(self, plan: ForwardPlan) -> Tensor:
        logits = self.run_part(plan, self._body)
        if logits.shape[1] != self.vocab_size:
            logits = logits[:, : self.vocab_size]
        return logits.to(self.dtype)

    def run_part(
        self, plan: ForwardPlan, part: Callable[[ForwardPlan, PagedAttention], Tensor]
    ) -> Tensor:
        """What `part` of the body makes of a prepared forward."""
        self._attention.plan = plan
        try:
            with _current(self.device):
                return part(plan, self._attention)
        finally:
            self._attention.plan = None


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches kernels on the current GPU, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

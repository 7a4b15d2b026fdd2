"""Runs any decoder-only transformers model over paged KV memory, eagerly."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.cache.kv_store import KVStore
from server.runner.attention import PagedAttention
from server.runner.base import Batch
from server.runner.plan import ForwardPlan, make_plan


class TorchRunner:
    """A ModelRunner; see its attributes. Not thread-safe: one thread at a time may forward.

    `forward` is prepare, then run: all index tensors are made before the first layer, and
    running them reads nothing back to the host.
    """

    def __init__(
        self, name: str, model: PreTrainedModel, vocab_size: int, max_length: int, store: KVStore
    ) -> None:
        """`model` is in eval mode on its device; it attends through this runner from now on."""
        self.name = name
        self.model = model
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self._attention = PagedAttention(store)
        self._attention.attach(model)

    @property
    def store(self) -> KVStore:
        return self._attention.store

    @store.setter
    def store(self, store: KVStore) -> None:
        """Exchange the KV memory; everything consumed so far is forgotten."""
        self._attention.store = store

    @property
    def page_size(self) -> int:
        return self.store.page_size

    @property
    def num_pages(self) -> int:
        return self.store.num_pages

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """See ModelRunner.forward."""
        return self._run(make_plan(batch, self.page_size, self.device))

    def _run(self, plan: ForwardPlan) -> Tensor:
        self._attention.plan = plan
        try:
            output = self.model(
                input_ids=plan.token_ids,
                position_ids=plan.position_ids,
                use_cache=False,
                logits_to_keep=plan.keep,
            )
        finally:
            self._attention.plan = None
        logits: Tensor = output.logits[0, :, : self.vocab_size]
        return logits.to(self.dtype)

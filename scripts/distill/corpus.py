"""Shards of expert-written text on disk, with the expert's hidden state of every token."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scripts.distill.expert import Written


@dataclass(frozen=True, slots=True)
class Shard:
    """Sequences laid end to end; sequence i holds tokens starts[i] to starts[i + 1].

    `hidden` has the same layout; the row of a sequence's last token is zero (nothing follows it).
    """

    token_ids: Tensor  # [num_tokens] int32
    hidden: Tensor  # [num_tokens, hidden_size] float16
    starts: Tensor  # [num_sequences + 1] int64
    num_prompt: Tensor  # [num_sequences] int64
    temperature: Tensor  # [num_sequences] float32

    @property
    def num_sequences(self) -> int:
        return len(self.num_prompt)


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:04d}.safetensors"


def save_shard(
    path: Path, written: Sequence[Written], temperatures: Sequence[float], kinds: Sequence[str]
) -> int:
    """Writes the shard under a temporary name first; returns its number of tokens."""
    lengths = [len(w.token_ids) for w in written]
    none = torch.zeros(1, written[0].hidden.shape[1], dtype=torch.float16)
    tensors = {
        "token_ids": torch.cat([w.token_ids for w in written]).int(),
        "hidden": torch.cat([t for w in written for t in (w.hidden.half(), none)]),
        "starts": torch.tensor([0, *lengths]).cumsum(0),
        "num_prompt": torch.tensor([w.num_prompt for w in written]),
        "temperature": torch.tensor(list(temperatures)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    save_file(tensors, fresh, metadata={"kinds": json.dumps(list(kinds))})
    os.replace(fresh, path)
    return sum(lengths)


def load_shard(path: Path) -> Shard:
    with safe_open(path, framework="pt") as file:
        names = ("token_ids", "hidden", "starts", "num_prompt", "temperature")
        return Shard(*(file.get_tensor(name) for name in names))

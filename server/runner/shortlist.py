"""Shortlists: a member proposes from a part of its vocabulary, with a part of its head.

The output's law does not depend on what proposals are drawn from (docs/decoding.md), so a small
model, most of whose weights are its head, may draw from the tokens that come up at all. Its full
scores are computed when positions are decided, many in one product.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from server.errors import ConfigError
from server.runner.base import Batch
from server.runner.llama_body import LlamaBody
from server.runner.torch_runner import TorchRunner

FILE = "shortlist.json"
AUTO = "auto"


def find_shortlist(
    name: str, setting: str | None, directory: str, vocab_size: int
) -> Tensor | None:
    """Token ids [n] int64 that member `name` may propose, ascending; None: any.

    Args:
        name: of the member, for messages.
        setting: `auto`: the file in the model's directory, if it has one; a path; None.
        directory: of the model.
        vocab_size: of the shared vocabulary; ids beyond it are refused.

    Raises:
        ConfigError: the file cannot be read, or is no list of distinct token ids.
    """
    if setting is None:
        return None
    path = Path(directory).expanduser() / FILE if setting == AUTO else Path(setting).expanduser()
    if setting == AUTO and not path.is_file():
        return None
    try:
        ids = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name}: cannot read shortlist {path}: {error}") from error
    is_list = isinstance(ids, list) and all(type(i) is int for i in ids) and ids
    if not is_list or len(set(ids)) < len(ids) or not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ConfigError(
            f"model {name}: shortlist {path} is no list of distinct token ids below {vocab_size}"
        )
    return torch.tensor(sorted(ids))


class Shortlist:
    """DeferredScores of a runner over a LlamaBody that was made with a shortlist."""

    def __init__(self, runner: TorchRunner, body: LlamaBody, ids: Tensor) -> None:
        """`ids` [n] int64 are those that `body` was made with."""
        self.shortlist = ids
        self.state_size = body.hidden_size
        self._runner = runner
        self._body = body

    @torch.inference_mode()
    def states(self, batch: Batch) -> Tensor:
        """See DeferredScores.states."""
        plan = self._runner.plan(batch)
        return self._runner.run_part(plan, self._body.states)

    @torch.inference_mode()
    def scores(self, states: Tensor) -> Tensor:
        """See DeferredScores.scores."""
        return self._body.head(states)[:, : self._runner.vocab_size]

    @torch.inference_mode()
    def shortlist_scores(self, states: Tensor) -> Tensor:
        """See DeferredScores.shortlist_scores."""
        assert self._body.short_head is not None
        return self._body.short_head(states.float())

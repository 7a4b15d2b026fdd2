"""Log-probabilities of prompts' tokens and of texts', where requests ask for them."""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from server.cache.on_device import tensor_on
from server.core.output import TokenLogprob
from server.core.sequence import Sequence
from server.engine.distributions import Distributions

_ROWS = 32  # positions whose log-probabilities are computed at once

Decided = tuple[Sequence, int, int]  # a sequence, a position of it, and how many from there on


class Logprobs:
    """Of places that have been scored, by the law of their sequence; the host waits for them."""

    def __init__(self, distributions: Distributions) -> None:
        self._distributions = distributions

    def of_texts(self, spans: Row[Decided]) -> list[list[TokenLogprob]]:
        """Of the tokens at these spans, which are decided, and as many of the best as is asked."""
        places = [
            (s, position) for s, start, count in spans for position in range(start, start + count)
        ]
        entries: list[TokenLogprob] = []
        for first in range(0, len(places), _ROWS):
            part = places[first : first + _ROWS]
            tokens = [sequence.token_ids[position] for sequence, position in part]
            num_top = [sequence.params.logprobs or 0 for sequence, _ in part]
            entries += _entries(self._distributions.target_logprobs(part), tokens, num_top)
        found = iter(entries)
        return [list(islice(found, count)) for _, _, count in spans]

    def of_prompt(self, sequence: Sequence) -> list[TokenLogprob]:
        """Of the prompt's next tokens, as far as every scorer has scored them."""
        first = sequence.num_scored
        seen = min(sequence.num_seen[k] for k in sequence.decoding.combination.scorers)
        end = min(seen + 1, sequence.num_prompt)
        entries: list[TokenLogprob] = []
        for start in range(first, end, _ROWS):
            positions = range(start, min(end, start + _ROWS))
            entries += self._of_positions(sequence, positions)
        return entries

    def _of_positions(self, sequence: Sequence, positions: range) -> list[TokenLogprob]:
        num_top = sequence.params.prompt_logprobs
        assert num_top is not None
        places = [(sequence, position) for position in positions]
        combination = sequence.decoding.combination
        logprobs = self._distributions.prompt_logprobs(places, combination)
        tokens = sequence.token_ids[positions.start : positions.stop]
        entries = _entries(logprobs, tokens, [num_top] * len(tokens))
        chosen = tensor_on(logprobs.device, [entry.logprob for entry in entries])
        ranks: list[int] = (logprobs > chosen[:, None]).sum(-1).tolist()
        return [replace(entry, rank=rank + 1) for entry, rank in zip(entries, ranks, strict=True)]


def _entries(logprobs: Tensor, token_ids: Row[int], num_top: Row[int]) -> list[TokenLogprob]:
    """Of rows [len(token_ids), V], and of each as many of the best as it asks for."""
    tokens = tensor_on(logprobs.device, token_ids)[:, None]
    values, ids = logprobs.topk(max(num_top), dim=-1)
    numbers: list[list[float]] = torch.cat([logprobs.gather(1, tokens), values], dim=1).tolist()
    return [
        TokenLogprob(token_id, chosen, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for token_id, (chosen, *row_values), row_ids, count in zip(
            token_ids, numbers, ids.tolist(), num_top, strict=True
        )
    ]

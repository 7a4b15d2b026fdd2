"""Log-probabilities of prompts' tokens and of texts', where requests ask for them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from server.cache.on_device import tensor_on
from server.core.output import TokenLogprob
from server.core.sequence import Sequence
from server.engine.distributions import Distributions

_PROMPT_ROWS = 32  # prompt positions whose log-probabilities are computed at once


class Logprobs:
    """Of places that have been scored, by the law of their sequence; the host waits for them."""

    def __init__(self, distributions: Distributions) -> None:
        self._distributions = distributions

    def of_text(
        self, sequence: Sequence, start: int, count: int, num_top: int
    ) -> list[TokenLogprob]:
        """Of the tokens at [start, start + count), which are decided, and the `num_top` best."""
        places = [(sequence, position) for position in range(start, start + count)]
        logprobs = self._distributions.target_logprobs(places)
        return _entries(logprobs, sequence.token_ids[start : start + count], num_top)

    def of_prompt(self, sequence: Sequence) -> list[TokenLogprob]:
        """Of the prompt's next tokens, as far as every scorer has scored them."""
        first = sequence.num_scored
        seen = min(sequence.num_seen[k] for k in sequence.decoding.combination.scorers)
        end = min(seen + 1, sequence.num_prompt)
        entries: list[TokenLogprob] = []
        for start in range(first, end, _PROMPT_ROWS):
            positions = range(start, min(end, start + _PROMPT_ROWS))
            entries += self._of_positions(sequence, positions)
        return entries

    def _of_positions(self, sequence: Sequence, positions: range) -> list[TokenLogprob]:
        num_top = sequence.params.prompt_logprobs
        assert num_top is not None
        places = [(sequence, position) for position in positions]
        combination = sequence.decoding.combination
        logprobs = self._distributions.prompt_logprobs(places, combination)
        tokens = sequence.token_ids[positions.start : positions.stop]
        entries = _entries(logprobs, tokens, num_top)
        chosen = tensor_on(logprobs.device, [entry.logprob for entry in entries])
        ranks: list[int] = (logprobs > chosen[:, None]).sum(-1).tolist()
        return [replace(entry, rank=rank + 1) for entry, rank in zip(entries, ranks, strict=True)]


def _entries(logprobs: Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprob]:
    """`logprobs`: [len(token_ids), V]."""
    tokens = tensor_on(logprobs.device, token_ids)[:, None]
    chosen: list[float] = logprobs.gather(1, tokens)[:, 0].tolist()
    values, ids = logprobs.topk(num_top, dim=-1)
    tops = [
        tuple(zip(row_ids, row_values, strict=True))
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return [
        TokenLogprob(token_id, logprob, top)
        for token_id, logprob, top in zip(token_ids, chosen, tops, strict=True)
    ]

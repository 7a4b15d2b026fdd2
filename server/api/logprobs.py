"""Log-probabilities in the shape of OpenAI's completions."""

from __future__ import annotations

import math
from collections.abc import Iterable

from server.api.codec import Codec
from server.api.protocol import Logprobs
from server.core.output import TokenLogprob

_LOWEST = -9999.0  # JSON has no infinity


class LogprobsWriter:
    """Log-probabilities of one choice; knows how far its text has come, in token strings."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._offset = 0

    def write(self, entries: Iterable[TokenLogprob]) -> Logprobs:
        logprobs = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for entry in entries:
            text = self._codec.token_text(entry.token_id)
            logprobs.tokens.append(text)
            logprobs.token_logprobs.append(_finite(entry.logprob))
            logprobs.top_logprobs.append(self._top(text, entry))
            logprobs.text_offset.append(self._offset)
            self._offset += len(text)
        return logprobs

    def _top(self, text: str, entry: TokenLogprob) -> dict[str, float]:
        """The token itself first. Of tokens that read alike, the most probable counts."""
        top = {text: _finite(entry.logprob)}
        for token_id, logprob in entry.top:
            other = self._codec.token_text(token_id)
            top[other] = max(top.get(other, _LOWEST), _finite(logprob))
        return top


def join(parts: Iterable[Logprobs]) -> Logprobs:
    """One after the other."""
    joined = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for part in parts:
        joined.tokens.extend(part.tokens)
        joined.token_logprobs.extend(part.token_logprobs)
        joined.top_logprobs.extend(part.top_logprobs)
        joined.text_offset.extend(part.text_offset)
    return joined


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST) if not math.isnan(logprob) else _LOWEST

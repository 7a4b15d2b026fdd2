"""Log-probabilities in the shapes of OpenAI's completions and of its chat completions."""

from __future__ import annotations

import math
from collections.abc import Iterable

from server.api.chat_protocol import ChatLogprobs, TokenScore, TokenTop
from server.api.codec import Codec
from server.api.completion_protocol import Logprobs
from server.core.output import TokenLogprob

_LOWEST = -9999.0  # JSON has no infinity


class TokenNames:
    """What log-probabilities call a token: its text, or "token_id:N" where that was asked for."""

    def __init__(self, codec: Codec, as_ids: bool) -> None:
        self._codec = codec
        self._as_ids = as_ids

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._codec.token_text(token_id)


class LogprobsWriter:
    """Log-probabilities of one completion; knows how far its text has come, in token strings."""

    def __init__(self, codec: Codec, as_ids: bool = False) -> None:
        self._codec = codec
        self._name = TokenNames(codec, as_ids)
        self._offset = 0

    def write(self, entries: Iterable[TokenLogprob]) -> Logprobs:
        logprobs = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for entry in entries:
            name = self._name(entry.token_id)
            logprobs.tokens.append(name)
            logprobs.token_logprobs.append(_finite(entry.logprob))
            logprobs.top_logprobs.append(self._top(name, entry))
            logprobs.text_offset.append(self._offset)
            self._offset += len(self._codec.token_text(entry.token_id))
        return logprobs

    def _top(self, name: str, entry: TokenLogprob) -> dict[str, float]:
        """The token itself first. Of tokens that read alike, the most probable counts."""
        top = {name: _finite(entry.logprob)}
        for token_id, logprob in entry.top:
            other = self._name(token_id)
            top[other] = max(top.get(other, _LOWEST), _finite(logprob))
        return top


def chat_logprobs(
    entries: Iterable[TokenLogprob], codec: Codec, as_ids: bool = False
) -> ChatLogprobs:
    """Tokens that read alike stay apart here: each entry carries the bytes of its own token."""
    name = TokenNames(codec, as_ids)

    def score(token_id: int, logprob: float) -> TokenTop:
        return TokenTop(
            token=name(token_id),
            logprob=_finite(logprob),
            bytes=list(codec.token_bytes(token_id)),
        )

    content = [
        TokenScore(
            **score(entry.token_id, entry.logprob).model_dump(),
            top_logprobs=[score(token_id, logprob) for token_id, logprob in entry.top],
        )
        for entry in entries
    ]
    return ChatLogprobs(content=content, refusal=None)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST) if not math.isnan(logprob) else _LOWEST

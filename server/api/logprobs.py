"""Log-probabilities in the shapes of OpenAI's completions and of its chat completions."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable
from dataclasses import replace

from server.api.chat_protocol import ChatLogprobs, TokenScore, TokenTop
from server.api.codec import Codec
from server.api.completion_protocol import Logprobs
from server.api.protocol import PromptLogprob, PromptLogprobs
from server.core.output import TokenLogprob

_LOWEST = -9999.0  # JSON has no infinity
_CONTINUATIONS = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character


class TokenNames:
    """What log-probabilities call a token: its text, or "token_id:N" where that was asked for."""

    def __init__(self, codec: Codec, as_ids: bool) -> None:
        self._codec = codec
        self._as_ids = as_ids

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._codec.token_text(token_id)


class LogprobsWriter:
    """Log-probabilities of one completion; knows how far its text has come, in characters."""

    def __init__(self, codec: Codec, as_ids: bool = False) -> None:
        self._codec = codec
        self._name = TokenNames(codec, as_ids)
        self._offset = 0
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, entries: Iterable[TokenLogprob], first: int | None = None) -> Logprobs:
        """`first` is a token before all others, that has no log-probability."""
        logprobs = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if first is not None:
            self._append(logprobs, first, None, None)
        for entry in entries:
            top = self._top(self._name(entry.token_id), entry)
            self._append(logprobs, entry.token_id, _finite(entry.logprob), top)
        return logprobs

    def _append(
        self,
        logprobs: Logprobs,
        token_id: int,
        logprob: float | None,
        top: dict[str, float] | None,
    ) -> None:
        logprobs.tokens.append(self._name(token_id))
        logprobs.token_logprobs.append(logprob)
        logprobs.top_logprobs.append(top)
        logprobs.text_offset.append(self._advance(self._codec.token_bytes(token_id)))

    def _advance(self, token: bytes) -> int:
        """Go on by one token, and say where it began.

        Tokens that are parts of one character all begin where it does.
        """
        if token[:1] not in _CONTINUATIONS:
            # What was begun and not completed reads as a character of its own.
            self._offset += len(self._characters.decode(b"", final=True))
        begun = self._offset
        self._offset += len(self._characters.decode(token))
        return begun

    def _top(self, name: str, entry: TokenLogprob) -> dict[str, float]:
        """The token itself first. Of tokens that read alike, the most probable counts."""
        top = {name: _finite(entry.logprob)}
        for token_id, logprob in entry.top:
            other = self._name(token_id)
            top[other] = max(top.get(other, _LOWEST), _finite(logprob))
        return top


def prompt_logprobs(
    entries: Iterable[TokenLogprob], num_top: int, codec: Codec, as_ids: bool = False
) -> PromptLogprobs:
    """By token id; as many alternatives as were asked for by this name."""
    name = TokenNames(codec, as_ids)

    def score(token_id: int, logprob: float, rank: int) -> PromptLogprob:
        return PromptLogprob(logprob=_finite(logprob), rank=rank, decoded_token=name(token_id))

    written: PromptLogprobs = [None]
    for entry in entries:
        scores = {str(entry.token_id): score(entry.token_id, entry.logprob, entry.rank)}
        for rank, (token_id, logprob) in enumerate(entry.top[:num_top], start=1):
            scores.setdefault(str(token_id), score(token_id, logprob, rank))
        written.append(scores)
    return written


def trimmed(entries: Iterable[TokenLogprob], num_top: int) -> list[TokenLogprob]:
    """With so many alternatives at most."""
    return [replace(entry, top=entry.top[:num_top]) for entry in entries]


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

"""Text to token ids and back, for prompts and for the token strings of logprobs."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

from server.errors import RequestError


class Encoding(Protocol):
    """The part of `tokenizers.Encoding` that is needed here."""

    @property
    def ids(self) -> list[int]: ...


class Tokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that is needed here; safe to use from many threads."""

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoding: ...

    def get_vocab_size(self) -> int: ...

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


class Codec:
    """A tokenizer and the size of the vocabulary that all models share."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        # Decoded after some other token, a token keeps the leading space that decoders of the
        # sentencepiece family drop at the start of a text.
        self._anchor = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor_text = self._decode(self._anchor)
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Slow for long texts: not for the event loop."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError) as error:
            raise RequestError("prompt is not valid Unicode text", param="prompt") from error

    def check_ids(self, ids: list[int], param: str) -> None:
        """Raises RequestError for the first id that is not in the shared vocabulary."""
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"{param}: token id {token_id} is not in the vocabulary of "
                    f"{self.vocab_size} tokens",
                    param=param,
                )

    def _token_text(self, token_id: int) -> str:
        return self._decode([*self._anchor, token_id])[len(self._anchor_text) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

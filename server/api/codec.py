"""Text to token ids and back, for prompts and for the token strings of logprobs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence as Row
from functools import lru_cache
from typing import Protocol

from server.api.chat_template import ChatTemplate
from server.errors import RequestError

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Encoding(Protocol):
    """The part of `tokenizers.Encoding` that is needed here."""

    @property
    def ids(self) -> list[int]: ...


class Tokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that is needed here; safe to use from many threads."""

    def encode_batch_fast(
        self, input: list[str], *, add_special_tokens: bool = True
    ) -> Row[Encoding]: ...

    def get_vocab_size(self) -> int: ...

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...

    def decode_batch(
        self, sequences: list[list[int]], skip_special_tokens: bool = True
    ) -> list[str]: ...

    def id_to_token(self, id: int) -> str | None: ...


class Codec:
    """The expert's tokenizer and chat template, and the vocabulary that all models share."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        chat_template: ChatTemplate | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`special_tokens` are by role, as in eos_token."""
        self.vocab_size = vocab_size
        self.chat_template = chat_template
        self.special_tokens = special_tokens or {}
        self._tokenizer = tokenizer
        # Decoded after some other token, a token keeps the leading space that decoders of the
        # sentencepiece family drop at the start of a text.
        self._anchor = self.encode("a", False)[-1:]
        self._anchor_text = self.decode(self._anchor)
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    def encode(self, text: str, add_special_tokens: bool, param: str = "prompt") -> list[int]:
        """Slow for long texts: not for the event loop."""
        try:
            # As a batch of one: only so does the library let other threads run meanwhile.
            [encoding] = self._tokenizer.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
            return encoding.ids
        except (TypeError, UnicodeError) as error:
            raise RequestError(f"{param} is not valid Unicode text", param=param) from error

    def forms(self, word: str, param: str) -> list[tuple[int, ...]]:
        """Token ids of a word as it begins a text and, where these differ, as it follows a space.

        Raises RequestError as `encode`.
        """
        texts = word.lstrip(), " " + word.lstrip()
        return list(dict.fromkeys(tuple(self.encode(text, False, param)) for text in texts))

    def check_ids(self, ids: list[int], param: str) -> None:
        """Raises RequestError for the first id that is not in the shared vocabulary."""
        if not ids or (min(ids) >= 0 and max(ids) < self.vocab_size):
            return
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"{param}: token id {token_id} is not in the vocabulary of "
                    f"{self.vocab_size} tokens",
                    param=param,
                )

    def vocabulary_entry(self, token_id: int) -> str:
        """A token as the vocabulary writes it."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """Its own bytes, where it is only a part of a character too."""
        text = self.token_text(token_id)
        if _REPLACEMENT not in text:
            return text.encode()
        token = self.vocabulary_entry(token_id)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        alphabet = _byte_alphabet()
        if all(character in alphabet for character in token):
            return bytes(alphabet[character] for character in token)
        return text.encode()

    def _token_text(self, token_id: int) -> str:
        # Not as a batch: to give other threads the lock for so little is to wait for it again.
        text = self._tokenizer.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text[len(self._anchor_text) :]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Slow for long texts; as `encode`, it lets other threads run."""
        [text] = self._tokenizer.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return text


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers (GPT-2's and its heirs) write bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted

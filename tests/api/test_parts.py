"""Pieces of the HTTP surface on their own."""

from __future__ import annotations

import math

import pytest

from server.api.codec import Codec
from server.api.logprobs import LogprobsWriter
from server.core.output import TokenLogprob
from server.errors import RequestError
from tests.support.api import DigitTokenizer, Encoding


class SpacyTokenizer(DigitTokenizer):
    """Drops the leading space of a text, as sentencepiece's decoders do; two ids read alike."""

    words = {0: "a", 1: " the", 2: "\ufffd", 3: "\ufffd", 4: " end"}

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoding:
        if sequence != "a":
            raise TypeError("not a text")
        return Encoding([0])

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:  # type: ignore[override]
        return "".join(self.words[i] for i in ids).removeprefix(" ")


@pytest.fixture
def codec() -> Codec:
    return Codec(SpacyTokenizer(), 5)


def test_token_text_keeps_its_leading_space(codec: Codec) -> None:
    assert [codec.token_text(i) for i in (1, 2, 4)] == [" the", "\ufffd", " end"]


def test_text_that_cannot_be_encoded_is_the_clients_fault(codec: Codec) -> None:
    with pytest.raises(RequestError) as error:
        codec.encode("\ud800", True)
    assert error.value.param == "prompt"


def test_logprobs_of_tokens_that_read_alike_keep_the_higher(codec: Codec) -> None:
    entry = TokenLogprob(2, -5.0, ((3, -0.1), (1, -2.0)))
    written = LogprobsWriter(codec).write([entry])
    assert written.token_logprobs == [-5.0]
    assert written.top_logprobs == [{"\ufffd": -0.1, " the": -2.0}]


def test_tokens_within_a_character_begin_where_it_does() -> None:
    """Two bytes of a heart, its third, a letter; then a lone byte, and what follows it."""
    parts = [b"\xe2\x9d", b"\xa4", b"a", b"\xe2", b" b", "é".encode(), b"!"]

    class Bytes(Codec):
        def token_bytes(self, token_id: int) -> bytes:
            return parts[token_id]

    codec = Bytes(SpacyTokenizer(), 5)
    writer = LogprobsWriter(codec, as_ids=True)
    offsets = writer.write([TokenLogprob(i, -1.0) for i in range(4)]).text_offset
    offsets += writer.write([TokenLogprob(i, -1.0) for i in range(4, 7)]).text_offset
    text = b"".join(parts).decode(errors="replace")
    assert offsets == [0, 0, 1, 2, 3, 5, 6]
    assert [text[i] for i in offsets] == ["❤", "❤", "a", "\ufffd", " ", "é", "!"]


def test_logprobs_are_finite_and_offsets_go_on(codec: Codec) -> None:
    writer = LogprobsWriter(codec)
    first = writer.write([TokenLogprob(1, -math.inf), TokenLogprob(2, 0.0)])
    second = writer.write([TokenLogprob(4, -1.0, ((4, -1.0), (1, -math.inf)))])
    assert first.text_offset + second.text_offset == [0, 4, 5]
    assert first.token_logprobs + second.token_logprobs == [-9999.0, 0.0, -1.0]
    assert second.top_logprobs[0] == {" end": -1.0, " the": -9999.0}

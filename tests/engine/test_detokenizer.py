from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer

from server.core.sampling_params import SamplingParams
from server.engine.detokenizer import TextStream
from tests.support.tiny_models import make_tokenizer

TOKENIZER: Tokenizer = make_tokenizer().backend_tokenizer
TEXT = "Grüße, 世界! 🎉👩‍👩‍👧 naïve — the value of data\n\tis not it. \ufffd end"


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def open_stream(prompt: str = "", **options: Any) -> TextStream:
    return TextStream(TOKENIZER, encode(prompt), SamplingParams(max_tokens=999, **options))


def oracle(text: str, ids: list[int], stops: tuple[str, ...], include: bool) -> tuple[str, int]:
    """Cut at the stop string that completes first, one character at a time."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            cut = text[:end] if include else text[: end - max(map(len, ending))]
            count = next(
                n for n in range(len(ids) + 1) if TOKENIZER.decode(ids[:n]).startswith(text[:end])
            )
            return cut, count
    return text, len(ids)


@pytest.mark.parametrize("seed", range(40))
def test_random_pushes_release_the_whole_text_and_never_a_broken_character(seed: int) -> None:
    rng = random.Random(seed)
    ids = encode(TEXT)
    stream = open_stream("Some prompt")
    text, start = "", 0
    while start < len(ids):
        count = rng.randint(1, 6)
        new, match = stream.push(ids[start : start + count])
        assert match is None
        text += new
        assert TEXT.startswith(text)
        start += count
    assert text + stream.flush()[0] == TEXT


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_stop_strings_cut_where_the_first_completes(seed: int, include: bool) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("abAB ") for _ in range(60))
    stops = tuple("".join(rng.choice("abAB ") for _ in range(rng.randint(1, 5))) for _ in range(3))
    ids = encode(text)
    stream = open_stream("x", stop=stops, include_stop=include)
    expected, num_tokens = oracle(text, ids, stops, include)
    got, used = "", 0
    while used < len(ids):
        count = rng.randint(1, 4)
        new, match = stream.push(ids[used : used + count])
        got += new
        assert expected.startswith(got)
        if match is not None:
            assert used + match.num_tokens == num_tokens
            assert match.stop in stops
            break
        used += count
    else:
        rest, match = stream.flush()
        assert match is None
        got += rest
        assert num_tokens == len(ids)
    assert got == expected


def test_an_unfinished_stop_string_is_held_back_and_then_released() -> None:
    stream = open_stream(stop=("abc",))
    assert stream.push(encode("xab")) == ("x", None)
    assert stream.push(encode("d")) == ("a", None)  # "bd" may not begin "abc", but it is held
    assert stream.flush() == ("bd", None)


def test_min_tokens_ignores_early_matches() -> None:
    ids = encode("a;b;c;d")
    stream = open_stream(stop=(";",), min_tokens=3)
    text, match = stream.push(ids)
    assert text == "a;b"
    assert match is not None
    assert match.num_tokens == 4


@pytest.mark.parametrize(("min_tokens", "expected"), [(1, 2), (2, 4), (3, 4), (4, None)])
def test_a_stop_string_counts_behind_so_many_tokens(min_tokens: int, expected: int | None) -> None:
    _, match = open_stream(stop=(";",), min_tokens=min_tokens).push(encode("a;b;"))
    assert (match and match.num_tokens) == expected


def test_an_unfinished_character_is_flushed_as_replacement() -> None:
    ids = encode("é")
    stream = open_stream()
    assert stream.push(ids[:1]) == ("", None)
    assert stream.flush() == ("\ufffd", None)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_that_only_the_end_of_the_text_completes(include: bool) -> None:
    """Until then the rest of the character may come, and nothing of its token is shown."""

    class Decoder:
        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            return "".join(["ab", "c\ufffd"][i] for i in ids)

    for stop, cut in (("bc", "a"), ("\ufffd", "abc"), ("bc\ufffd", "a")):
        params = SamplingParams(max_tokens=9, stop=(stop,), include_stop=include)
        stream = TextStream(Decoder(), [], params)
        text, match = stream.push([0, 1])
        assert match is None
        rest, match = stream.flush()
        assert match is not None
        assert match.stop == stop
        assert text + rest == cut + stop * include


class StrippingDecoder:
    """As sentencepiece tokenizers decode: words begin with a space, and the first one loses it."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(" " + "?AB"[i] for i in ids if i > 0).removeprefix(" ")


def test_a_skipped_token_does_not_swallow_the_next_space() -> None:
    stream = TextStream(StrippingDecoder(), [1], SamplingParams(max_tokens=9))
    assert "".join(stream.push([i])[0] for i in (1, 0, 2, 2)) == " A B B"


def test_text_that_never_becomes_a_character_is_released_all_the_same() -> None:
    broken = encode("é")[:1]
    stream = open_stream()
    released = "".join(stream.push(broken)[0] for _ in range(200))
    assert len(released) >= 100
    assert released + stream.flush()[0] == "\ufffd" * 200


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    special = TOKENIZER.token_to_id("<|im_end|>")
    assert special is not None
    ids = [*encode("a"), special, *encode("b")]
    assert open_stream().push(ids)[0] == "ab"
    assert open_stream(skip_special_tokens=False).push(ids)[0] == "a<|im_end|>b"

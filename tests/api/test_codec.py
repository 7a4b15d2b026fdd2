"""Text to token ids and back: what it costs others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from tokenizers import normalizers

from server.api.codec import Codec
from server.errors import RequestError
from tests.support.tiny_models import VOCAB_SIZE, make_tokenizer

TEXT = "the return of value number list " * 20_000


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(make_tokenizer().backend_tokenizer, VOCAB_SIZE)


def num_ticks(work: Callable[[], object]) -> int:
    """How often this thread got to run while another one did `work()`."""
    thread = threading.Thread(target=work)
    ticks = 0
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    return ticks


def test_others_run_while_a_long_text_is_tokenised(codec: Codec) -> None:
    assert num_ticks(lambda: codec.encode(TEXT, True)) >= 5


def test_others_run_while_a_long_text_is_put_together(codec: Codec) -> None:
    ids = codec.encode(TEXT, True) * 5
    assert num_ticks(lambda: codec.decode(ids)) >= 5


def test_a_text_is_what_its_tokens_say(codec: Codec) -> None:
    text = "the été 🙂 of\n"
    assert codec.decode(codec.encode(text, False)) == text
    assert codec.encode("", False) == []


@pytest.mark.parametrize("word", ["return", "values", "xyz", " the", "é"])
def test_forms_of_a_word_are_all_that_the_tokenizer_makes_of_it(codec: Codec, word: str) -> None:
    """Also where one form is one token and the other several."""
    forms = codec.forms(word, "bad_words")
    assert forms == [
        tuple(codec.encode(text, False)) for text in (word.strip(), " " + word.strip())
    ]


def test_forms_that_are_one(codec: Codec) -> None:
    spaces = make_tokenizer().backend_tokenizer
    spaces.normalizer = normalizers.Prepend(" ")
    assert Codec(spaces, VOCAB_SIZE).forms("the", "bad_words")[0] == codec.forms("the", "")[1]
    spaces.normalizer = normalizers.Strip()
    assert Codec(spaces, VOCAB_SIZE).forms("the", "bad_words") == codec.forms("the", "")[:1]


def test_ids_beyond_the_vocabulary_are_named(codec: Codec) -> None:
    codec.check_ids([0, VOCAB_SIZE - 1], "prompt")
    codec.check_ids([], "prompt")
    for wrong in (-1, VOCAB_SIZE):
        with pytest.raises(RequestError, match=f"token id {wrong} is not"):
            codec.check_ids([0, wrong, 1], "prompt")

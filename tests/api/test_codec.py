"""Text to token ids and back: what it costs others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

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


def test_ids_beyond_the_vocabulary_are_named(codec: Codec) -> None:
    codec.check_ids([0, VOCAB_SIZE - 1], "prompt")
    codec.check_ids([], "prompt")
    for wrong in (-1, VOCAB_SIZE):
        with pytest.raises(RequestError, match=f"token id {wrong} is not"):
            codec.check_ids([0, wrong, 1], "prompt")

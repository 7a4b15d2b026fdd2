"""Work that another thread ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.api import interruptible
from server.api.chat_template import TokenizerTemplate, Turns
from server.api.interruptible import Interrupted, Interruptible
from tests.support.tiny_models import make_tokenizer

# Some 10^15 rounds.
ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% if a + b + c < 0 %}x{% endif %}{% endfor %}{% endfor %}{% endfor %}"
)


def test_a_template_without_end_is_ended() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ENDLESS
    template = TokenizerTemplate(tokenizer)
    turns = Turns([{"role": "user", "content": "a"}], True, False, None, {})
    work = Interruptible()
    with ThreadPoolExecutor(1) as pool:
        rendering = pool.submit(work.run, lambda: template.render(turns))
        time.sleep(0.1)
        assert not rendering.done()
        work.interrupt()
        with pytest.raises(Interrupted):
            rendering.result(60)
        # The thread lives, and what it does next is not hit.
        assert pool.submit(lambda: sum(range(10))).result(60) == 45


def test_work_that_is_done_is_left_alone() -> None:
    work = Interruptible()
    assert work.run(lambda: "text") == "text"
    work.interrupt()
    assert sum(range(10)) == 45


def test_work_that_nobody_interrupts_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raising in a thread, even nothing, slows all threads down until it has arrived."""
    monkeypatch.setattr(interruptible, "_interrupt", lambda thread: pytest.fail("raised"))
    work = Interruptible()
    assert work.run(lambda: "text") == "text"
    work.interrupt()


def test_what_is_interrupted_before_it_begins_never_does() -> None:
    work = Interruptible()
    work.interrupt()
    with pytest.raises(Interrupted):
        work.run(lambda: pytest.fail("has begun"))


def test_an_interruption_hits_the_work_or_nothing() -> None:
    """At any moment: it may come just when the work ends."""

    def attempt(rounds: int) -> bool:
        work, began = Interruptible(), threading.Event()

        def count() -> int:
            began.set()
            return sum(1 for _ in range(rounds))

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(run, work, count)
            began.wait()
            work.interrupt()
            assert pool.submit(lambda: sum(range(1000))).result(60) == 499500
            return done.result(60)

    def run(work: Interruptible, count: Callable[[], int]) -> bool:
        try:
            work.run(count)
        except Interrupted:
            return True
        # Python code that a late one would end.
        sum(1 for _ in range(1000))
        return False

    outcomes = [attempt(rounds) for rounds in [1, 10, 100, 1000, 5_000_000] * 20]
    assert set(outcomes) == {True, False}

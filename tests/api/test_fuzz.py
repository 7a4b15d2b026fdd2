"""Hostile input by the thousand: nothing crashes, and nothing is the server's fault.

COS_FUZZ_EXAMPLES=20000 python -m pytest tests/api/test_fuzz.py runs as many of each.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings, strategies as st

from server.api.chat_protocol import ChatCompletionRequest
from server.api.completion_protocol import CompletionRequest
from server.api.unsupported import REFUSED
from server.core.sampling_params import SamplingParams
from server.engine.detokenizer import TextStream
from tests.api.conftest import Live
from tests.support.api import MODEL

FUZZ = settings(
    max_examples=int(os.environ.get("COS_FUZZ_EXAMPLES", "150")),
    deadline=None,
    derandomize="COS_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
)
_FIELDS = sorted({*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields, *REFUSED})
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**40, 0.5, 1e-300, 1e300, -0.0, 2.0]),
    st.text(max_size=20),
    st.sampled_from(
        ["", "1", "text", "json_object", "weighted", "cos", "mixture", "user", "\u0000"]
    ),
)
_KEYS = st.one_of(
    st.sampled_from(["method", "weights", "mu", "strategy", "gamma", "type", "role", "content"]),
    st.sampled_from(["text", "0", "35", "36", "-1", "include_usage", "name", "schema"]),
    st.text(max_size=5),
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)
_BODIES = st.fixed_dictionaries(
    {"model": st.just(MODEL), "max_tokens": st.integers(1, 3)},
    optional={name: _VALUES for name in _FIELDS if name not in ("model", "max_tokens")},
)
_PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


def check(live: Live, path: str, **content: Any) -> None:
    response = live.http.post(path, headers={"content-type": "application/json"}, **content)
    if response.status_code == 200:
        return
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    # Scores that are no distribution are what some of these bodies ask for.
    assert response.status_code < 500 or error["code"] == "generation_failed", (content, error)
    assert len(response.content) < 10_000


@FUZZ
@given(
    path=st.sampled_from(_PATHS),
    body=_BODIES,
    prompt=st.one_of(st.just("1 2"), st.just([1, 2]), _VALUES),
    messages=st.one_of(st.just([{"role": "user", "content": "1"}]), _VALUES),
)
def test_any_body_is_answered_or_refused(
    live: Live, path: str, body: dict[str, Any], prompt: Any, messages: Any
) -> None:
    field, value = ("messages", messages) if "chat" in path else ("prompt", prompt)
    check(live, path, json={**body, field: value})


@FUZZ
@given(
    path=st.sampled_from(_PATHS),
    raw=st.one_of(
        st.binary(max_size=200),
        st.text(alphabet='{}[]":,\\u0eE+-.truefalsnNaIiy ', max_size=80).map(str.encode),
        st.integers(1, 20_000).map(lambda depth: b"[" * depth),
        st.integers(1, 5_000).map(lambda depth: b'{"a":' * depth),
    ),
)
def test_any_bytes_are_refused(live: Live, path: str, raw: bytes) -> None:
    check(live, path, content=raw)


class ByteDecoder:
    """A token's id is an index into a list of byte strings; broken UTF-8 becomes U+FFFD."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return b"".join(self._pieces[i] for i in ids).decode("utf-8", errors="replace")


_CHARACTERS = st.text(alphabet="ab\u00e9\u5b57\U0001f600 \n", max_size=30)


@FUZZ
@given(
    text=_CHARACTERS,
    sizes=st.lists(st.integers(1, 3), max_size=120),
    stops=st.lists(st.text(alphabet="ab\u00e9\u5b57 ", min_size=1, max_size=4), max_size=4),
    pushes=st.lists(st.integers(1, 5), max_size=120),
    include_stop=st.booleans(),
)
def test_text_ends_where_the_first_stop_string_completes(
    text: str, sizes: list[int], stops: list[str], pushes: list[int], include_stop: bool
) -> None:
    """However characters are cut into tokens, and tokens into steps."""
    pieces = _cut(text.encode(), sizes)
    params = SamplingParams(max_tokens=200, stop=tuple(stops), include_stop=include_stop)
    shown, match = _stream(pieces, pushes, params)
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not found:
        assert (shown, match) == (text, None)
        return
    end, begin = min(found)
    assert match == text[begin:end]
    assert shown == text[: end if include_stop else begin]


@FUZZ
@given(
    raw=st.lists(st.binary(min_size=1, max_size=4), max_size=60),
    stops=st.lists(st.text(min_size=1, max_size=3), max_size=3),
    pushes=st.lists(st.integers(1, 5), max_size=60),
)
def test_bytes_that_are_no_text_still_end(
    raw: list[bytes], stops: list[str], pushes: list[int]
) -> None:
    shown, match = _stream(raw, pushes, SamplingParams(max_tokens=200, stop=tuple(stops)))
    shown.encode()
    if match is None:
        assert not any(stop in shown for stop in stops)


def _cut(raw: bytes, sizes: Sequence[int]) -> list[bytes]:
    pieces, start = [], 0
    for size in [*sizes, *[1] * len(raw)]:
        if start < len(raw):
            pieces.append(raw[start : start + size])
            start += size
    return pieces


def _stream(
    pieces: Sequence[bytes], pushes: Sequence[int], params: SamplingParams
) -> tuple[str, str | None]:
    stream = TextStream(ByteDecoder(pieces), [], params)
    shown, start = "", 0
    for size in [*pushes, *[1] * len(pieces)]:
        ids = range(len(pieces))[start : start + size]
        start += size
        if not ids:
            break
        text, match = stream.push(list(ids))
        shown += text
        if match is not None:
            return shown, match.stop
    text, match = stream.flush()
    return shown + text, None if match is None else match.stop

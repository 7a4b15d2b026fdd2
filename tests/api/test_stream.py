"""Streams, as raw bytes from a real socket."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from torch import Tensor

from server.runner.base import Batch
from tests.api.conftest import Live
from tests.support.api import EOS, IMPOSSIBLE, MODEL, PacedRunner
from tests.support.live_server import wait_until
from tests.support.sse import parse, texts

URL = "/v1/completions"


def test_headers_and_framing(live: Live) -> None:
    response = live.post(stream=True, max_tokens=6, ignore_eos=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-request-id"]
    assert b"\r" not in response.content
    assert response.content.count(b"data: [DONE]\n\n") == 1
    assert response.content.endswith(b"\n\ndata: [DONE]\n\n")


def test_chunks(live: Live) -> None:
    chunks = live.stream(max_tokens=20, ignore_eos=True)
    assert len(chunks) <= 20
    assert len({chunk["id"] for chunk in chunks}) == 1
    for chunk in chunks:
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
        assert len(chunk["choices"]) == 1
        assert chunk["choices"][0]["text"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]


@pytest.mark.parametrize("body", [{}, {"n": 3}, {"prompt": ["1", "2 3"], "n": 2}])
def test_a_stream_says_what_a_body_says(live: Live, body: dict[str, Any]) -> None:
    body = {"seed": 11, "max_tokens": 20, "stop": ["1 2"], **body}
    whole = live.complete(**body)
    chunks = live.stream(**body)
    assert texts(chunks) == {choice["index"]: choice["text"] for choice in whole["choices"]}
    ends = {
        choice["index"]: (choice["finish_reason"], choice["stop_reason"])
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"]
    }
    assert ends == {c["index"]: (c["finish_reason"], c["stop_reason"]) for c in whole["choices"]}


def test_logprobs_of_a_stream_join_to_those_of_a_body(live: Live) -> None:
    body = {"temperature": 0, "max_tokens": 15, "logprobs": 2, "ignore_eos": True}
    whole = live.complete(**body)["choices"][0]["logprobs"]
    parts = [chunk["choices"][0]["logprobs"] for chunk in live.stream(**body)]
    for key in ("tokens", "text_offset"):
        assert [entry for part in parts for entry in part[key]] == whole[key]
    joined = [entry for part in parts for entry in part["token_logprobs"]]
    assert joined == pytest.approx(whole["token_logprobs"], abs=1e-5)


def test_usage_comes_last_and_only_when_asked_for(live: Live) -> None:
    chunks = live.stream(max_tokens=9, ignore_eos=True, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 9
    assert chunks[-1]["cos"]["strategy"] == "auto"
    chunks = live.stream(max_tokens=9, stream_options={"include_usage": False})
    assert all("usage" not in chunk and "cos" not in chunk for chunk in chunks)


def test_continuous_usage_rises_with_every_chunk(live: Live) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = live.stream(max_tokens=20, ignore_eos=True, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["choices"]]
    assert counts == sorted(set(counts))
    assert counts[-1] == 20
    assert all(chunk["choices"][0]["text"] for chunk in chunks[:-1])


def test_a_text_without_characters_still_ends(live: Live) -> None:
    [chunk] = live.stream(logit_bias={str(EOS): 100}, max_tokens=5)
    assert chunk["choices"][0] == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Engines stand still in a forward until it is set."""
    gate, forward = threading.Event(), PacedRunner.forward

    def held(runner: PacedRunner, batch: Batch) -> Tensor:
        assert gate.wait(20)
        return forward(runner, batch)

    monkeypatch.setattr(PacedRunner, "forward", held)
    return gate


@pytest.fixture
def impatient(start: Callable[..., Live], gate: threading.Event) -> Live:
    """Pings every 50 ms."""
    live = start()
    service = live.table.service
    http = service.config.http.model_copy(update={"ping_seconds": 0.05})
    service.config = service.config.model_copy(update={"http": http})
    return live


PING = b": ping\n\n"


def test_pings_are_comments(impatient: Live, gate: threading.Event) -> None:
    gate.set()
    impatient.table.set_pace(0.1)
    response = impatient.post(stream=True, max_tokens=3, ignore_eos=True)
    assert b"\n\n: ping\n\n" in response.content
    assert parse(response.content)


def test_a_stream_without_a_token_pings(impatient: Live, gate: threading.Event) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "1"}], "stream": True}
    with impatient.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        pieces = response.iter_raw()
        assert next(pieces).startswith(PING)
        assert next(pieces).startswith(PING)
        gate.set()
        first, *_ = chunks = parse(b"".join(pieces))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["finish_reason"]
    impatient.wait_idle()


def test_an_error_after_the_first_ping_is_an_event(impatient: Live, gate: threading.Event) -> None:
    body = {"model": MODEL, "prompt": "1", "stream": True, **IMPOSSIBLE}
    with impatient.http.stream("POST", URL, json=body) as response:
        assert response.status_code == 200
        pieces = response.iter_raw()
        assert next(pieces).startswith(PING)
        gate.set()
        raw = b"".join(pieces)
    assert raw.endswith(b"data: [DONE]\n\n")
    [error] = parse(raw)
    assert error["error"]["code"] == "generation_failed"


def test_a_client_that_leaves_before_the_first_token_is_forgotten(
    impatient: Live, gate: threading.Event
) -> None:
    body = {"model": MODEL, "prompt": "1", "stream": True, "max_tokens": 200, "ignore_eos": True}
    with impatient.http.stream("POST", URL, json=body) as response:
        assert next(response.iter_raw()).startswith(PING)
    wait_until(lambda: impatient.table.service.num_open == 0)
    gate.set()
    impatient.wait_idle()
    finished = {"endpoint": "completions", "reason": "cancelled"}
    wait_until(lambda: impatient.table.value("cos_requests_finished_total", **finished) == 1)


def test_an_engine_failure_mid_stream_is_an_event(start) -> None:
    failures: list[BaseException] = []
    live = start(on_failure=failures.append)
    live.table.set_pace(0.02)
    raw = b""
    body = {"model": MODEL, "prompt": "1", "stream": True, "max_tokens": 200, "ignore_eos": True}
    with live.http.stream("POST", URL, json=body) as response:
        assert response.status_code == 200
        for piece in response.iter_raw():
            raw += piece
            live.table.runners[0].failure = RuntimeError("the device fell off")
    *chunks, last = parse(raw)
    assert chunks
    assert last["error"]["code"] == "engine_dead"
    wait_until(lambda: bool(failures))
    assert live.http.get("/health").status_code == 503
    assert live.http.get("/ready").json() == {"status": "unavailable", "phase": "failed"}
    for stream in (False, True):
        response = live.post(stream=stream)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_dead"
    assert live.table.value("cos_requests_finished_total", endpoint="completions", reason="error")


def test_an_impossible_distribution_fails_one_request_only(live: Live) -> None:
    for stream in (False, True):
        response = live.post(stream=stream, **IMPOSSIBLE)
        assert response.status_code == 500, response.text
        assert response.json()["error"]["code"] == "generation_failed"
    assert live.complete()
    live.wait_idle()


def test_a_client_that_leaves_a_stream_frees_the_engine(paced: Live) -> None:
    cancelled = {"endpoint": "completions", "reason": "cancelled"}
    before = paced.table.value("cos_requests_finished_total", **cancelled)
    body = {"model": MODEL, "prompt": ["1", "2"], "n": 2, "stream": True, "max_tokens": 200}
    with paced.http.stream("POST", URL, json=body | {"ignore_eos": True}) as response:
        next(response.iter_raw())
        assert paced.table.engine.has_work
    paced.wait_idle()
    wait_until(lambda: paced.table.value("cos_requests_finished_total", **cancelled) == before + 1)


def test_a_client_that_leaves_without_streaming_frees_the_engine(paced: Live) -> None:
    body = {"model": MODEL, "prompt": "1", "max_tokens": 200, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        paced.http.post(URL, json=body, timeout=0.2)
    paced.wait_idle()


def test_a_client_that_leaves_the_queue_is_forgotten(start) -> None:
    live = start(engine={"max_sequences": 1})
    live.table.set_pace(0.02)
    body = {"model": MODEL, "prompt": "1", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with live.http.stream("POST", URL, json=body) as running:
        pieces = running.iter_raw()  # httpx hangs up once this is forgotten
        next(pieces)
        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                live.http.post(URL, json=body | {"stream": stream}, timeout=0.2)
        wait_until(lambda: not live.table.engine.scheduler.waiting)
        assert live.table.value("cos_requests_waiting") == 0
    live.wait_idle()


def test_64_streams_at_once_lose_and_mix_nothing(live: Live) -> None:
    rng = random.Random(0)
    bodies = [
        {
            "model": MODEL,
            "prompt": [rng.randrange(34) for _ in range(rng.randrange(1, 60))],
            "max_tokens": rng.randrange(1, 60),
            "seed": i,
            "ignore_eos": True,
            "n": 1 + i % 2,
        }
        for i in range(64)
    ]
    streams = asyncio.run(_post_all(live.url, [{**body, "stream": True} for body in bodies]))
    found = [texts(parse(response.content)) for response in streams]
    wholes = asyncio.run(_post_all(live.url, bodies))
    assert found == [_texts(response.json()) for response in wholes]
    for i in range(0, 64, 11):
        assert found[i] == _texts(live.complete(**bodies[i]))
    live.wait_idle()


def _texts(body: dict[str, Any]) -> dict[int, str]:
    return {choice["index"]: choice["text"] for choice in body["choices"]}


async def _post_all(url: str, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        return await asyncio.gather(*(client.post(URL, json=body) for body in bodies))

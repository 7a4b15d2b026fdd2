"""Who is let in, and what the others learn."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message

from server.api.body import BodyTooLarge, discard_body, read_body
from server.api.gate import OPEN_PATHS
from server.logs import JsonFormatter
from tests.api.conftest import Live, serve
from tests.api.test_errors import error_of
from tests.support.api import MODEL, make_table_app
from tests.support.live_server import wait_until

KEY = "alice-0123456789abcdef"
OTHER = "bob-0123456789abcdefgh"
AUTH = {"Authorization": f"Bearer {KEY}"}
BODY = {"model": MODEL, "prompt": "1 2"}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serve(
        make_table_app(http={"keys_file": keys_file(tmp_path_factory.mktemp("keys"))})
    ) as live:
        yield live


def keys_file(folder: Path) -> str:
    file = folder / "keys"
    file.write_text(f"alice:{KEY}\nbob:{OTHER}\n")
    return str(file)


def with_keys(start, tmp_path: Path, **http: Any) -> Live:
    live: Live = start(http={"keys_file": keys_file(tmp_path), **http})
    return live


def raw(live: Live, request: bytes) -> bytes:
    """The answer to a request that no client library would send."""
    with socket.create_connection(("127.0.0.1", httpx.URL(live.url).port or 0), 10) as client:
        client.sendall(request)
        answer = b""
        while piece := client.recv(65536):
            answer += piece
        return answer


def test_everything_but_probes_needs_a_key(keyed: Live) -> None:
    document = keyed.http.get("/openapi.json", headers=AUTH).json()
    routes = [(path, method) for path, each in document["paths"].items() for method in each]
    routes += [("/openapi.json", "get"), ("/v1/none", "get"), ("/", "get"), ("/health/", "get")]
    seen = set()
    for path, method in routes:
        response = keyed.http.request(method, path, json=BODY if method == "post" else None)
        if path in OPEN_PATHS:
            seen.add(path)
            assert response.status_code in (200, 405), path
            continue
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == "Bearer"
        error = error_of(response)
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        with_key = keyed.http.request(
            method, path, json=BODY if method == "post" else None, headers=AUTH
        )
        assert with_key.status_code in (200, 400, 404), path
    assert seen == OPEN_PATHS


@pytest.mark.parametrize(
    "request_line",
    [
        "GET http://h/health/../v1/models HTTP/1.1\r\nHost: h",
        "GET /v1/models HTTP/1.1\r\nHost: h/health?",
        "GET /v1/models HTTP/1.1\r\nHost: h\r\nX-Forwarded-Path: /health",
        "GET //health HTTP/1.1\r\nHost: h",
        "GET /health/../v1/models HTTP/1.1\r\nHost: h",
        "GET /health%2f..%2fv1/models HTTP/1.1\r\nHost: h",
        "GET /v1/models#/health HTTP/1.1\r\nHost: h",
        "GET /v1/models?path=/health HTTP/1.1\r\nHost: h",
        "GET /v1/models;/health HTTP/1.1\r\nHost: h",
    ],
)
def test_no_way_of_writing_the_path_leads_around(keyed: Live, request_line: str) -> None:
    answer = raw(keyed, f"{request_line}\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] in (b"401", b"400")
    assert MODEL.encode() not in answer


def test_a_large_body_without_a_key_still_gets_its_answer(keyed: Live) -> None:
    size = keyed.table.config.http.max_body_bytes // 2
    before = keyed.table.value("cos_requests_rejected_total", reason="invalid_api_key")
    response = keyed.http.post("/v1/completions", content=b"x" * size)
    assert response.status_code == 401
    after = keyed.table.value("cos_requests_rejected_total", reason="invalid_api_key")
    assert after == before + 1


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("POST /health", b"405"),
        ("DELETE /health", b"405"),
        ("PUT /v1/completions", b"405"),
        ("GET /v1/models", b"200"),
        ("POST /v1/none", b"404"),
    ],
)
def test_no_body_is_awaited_where_no_route_takes_one(keyed: Live, line: str, status: bytes) -> None:
    """Nor kept: whoever sends one without a key would hold megabytes for as long as bodies get."""
    head = f"{line} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(keyed.url).port or 0), 10) as client:
        client.sendall(f"{head}Content-Length: {4 << 20}\r\n\r\n{{".encode())
        assert client.recv(65536).startswith(b"HTTP/1.1 " + status)


def test_a_body_that_nobody_wants_is_read_and_not_kept() -> None:
    """Beyond the limit nothing is kept either, and somewhere it ends."""
    pieces = [b"x" * (64 << 10)] * 100
    num_read = 0

    async def receive() -> Message:
        nonlocal num_read
        num_read += 1
        is_last = num_read == len(pieces)
        return {"type": "http.request", "body": pieces[num_read - 1], "more_body": not is_last}

    tracemalloc.start()
    asyncio.run(discard_body(receive, 2 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_read == len(pieces)
    assert peak < 1 << 20
    num_read = 0
    with pytest.raises(BodyTooLarge):
        asyncio.run(read_body(receive, 640 << 10))
    assert num_read == 41


def test_keys_of_the_sdk_work(keyed: Live) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=KEY, max_retries=0)
    assert client.completions.create(model=MODEL, prompt="1 2", max_tokens=2).choices
    wrong = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="x" * 20, max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
        wrong.completions.create(model=MODEL, prompt="1 2")
    client.close()
    wrong.close()


def test_secrets_appear_nowhere(keyed: Live, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    answers = [
        keyed.http.post("/v1/completions", json=BODY, headers=AUTH),
        keyed.http.post("/v1/completions", json={**BODY, "n": -1}, headers=AUTH),
        keyed.http.post("/v1/completions", json=BODY, headers={"Authorization": f"Basic {KEY}"}),
        keyed.http.get("/v1/models", headers=AUTH),
        keyed.http.get("/tokenizer_info", headers=AUTH),
        keyed.http.get("/metrics", headers=AUTH),
        keyed.http.get("/openapi.json", headers=AUTH),
    ]
    logged = [JsonFormatter().format(each) for each in caplog.records if each.name[:6] == "server"]
    assert any(json.loads(line).get("client") == "alice" for line in logged)
    for secret in (KEY, OTHER, KEY[6:]):
        assert all(secret not in each.text + str(each.headers) for each in answers)
        assert all(secret not in line for line in logged)
        assert secret not in repr(keyed.table.service.keys) + repr(keyed.table.config)


def test_open_requests_of_one_key_are_limited(start, tmp_path: Path) -> None:
    live = with_keys(start, tmp_path, max_open_requests_per_key=1)
    live.table.set_pace(0.02)
    body = {**BODY, "stream": True, "max_tokens": 100, "ignore_eos": True}
    with live.http.stream("POST", "/v1/completions", json=body, headers=AUTH) as running:
        assert running.status_code == 200
        refused = live.http.post("/v1/completions", json=BODY, headers=AUTH)
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "too_many_requests"
        assert int(refused.headers["retry-after"]) > 0
        other = {"Authorization": f"Bearer {OTHER}"}
        assert live.http.post("/v1/completions", json=BODY, headers=other).status_code == 200
        assert live.http.get("/v1/models", headers=AUTH).status_code == 200
    live.wait_idle()
    wait_until(lambda: live.table.service.clients["alice"].num_open == 0)
    live.table.set_pace(0)
    assert live.http.post("/v1/completions", json=BODY, headers=AUTH).status_code == 200
    assert live.table.value("cos_requests_rejected_total", reason="rate_limit") == 1


def test_tokens_of_one_key_are_limited(start, tmp_path: Path) -> None:
    live = with_keys(start, tmp_path, tokens_per_minute_per_key=10)
    body = {**BODY, "max_tokens": 20, "ignore_eos": True}
    first = live.http.post("/v1/completions", json=body, headers=AUTH)
    assert first.status_code == 200  # 2 + 20 tokens: the bucket runs over
    refused = live.http.post("/v1/completions", json=body, headers=AUTH)
    assert refused.status_code == 429
    assert error_of(refused)["code"] == "rate_limit_exceeded"
    assert 60 < int(refused.headers["retry-after"]) <= 78
    other = {"Authorization": f"Bearer {OTHER}"}
    assert live.http.post("/v1/completions", json=body, headers=other).status_code == 200


def test_a_prompt_that_the_queue_refuses_is_not_charged(start, tmp_path: Path) -> None:
    http = {"keys_file": keys_file(tmp_path), "tokens_per_minute_per_key": 100}
    live = start(http=http, engine={"max_sequences": 1, "max_waiting": 1})
    body = {**BODY, "prompt": [1] * 150, "n": 2, "max_tokens": 1}
    live.table.set_pace(0.02)
    running = {**BODY, "max_tokens": 100, "stream": True, "ignore_eos": True}
    other = {"Authorization": f"Bearer {OTHER}"}
    with live.http.stream("POST", "/v1/completions", json=running, headers=other) as response:
        assert response.status_code == 200
        for _ in range(3):
            refused = live.http.post("/v1/completions", json=body, headers=AUTH)
            assert error_of(refused)["code"] == "queue_full"
    live.wait_idle()
    assert live.http.post("/v1/completions", json=body, headers=AUTH).status_code == 200
    spent = live.http.post("/v1/completions", json=body, headers=AUTH)
    assert error_of(spent)["code"] == "rate_limit_exceeded"


def test_open_requests_of_all_are_limited(start) -> None:
    live = start(http={"max_open_requests": 2})
    live.table.set_pace(0.02)
    body = {**BODY, "stream": True, "max_tokens": 100, "ignore_eos": True}
    with (
        live.http.stream("POST", "/v1/completions", json=body),
        live.http.stream("POST", "/v1/completions", json=body),
    ):
        refused = live.post()
        assert refused.status_code == 429
        assert "limit is 2" in error_of(refused)["message"]
        assert live.http.get("/health").status_code == 200
    live.wait_idle()


ORIGIN = {"Origin": "https://app.example"}


def test_pages_of_other_origins_are_refused_by_default(live: Live) -> None:
    response = live.http.get("/v1/models", headers=ORIGIN)
    assert "access-control-allow-origin" not in response.headers
    preflight = live.http.options(
        "/v1/completions", headers={**ORIGIN, "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 405
    assert "access-control-allow-origin" not in preflight.headers


def test_pages_of_listed_origins_may_call(start, tmp_path: Path) -> None:
    live = with_keys(start, tmp_path, cors_origins=["https://app.example"])
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
    }
    preflight = live.http.options("/v1/completions", headers=ORIGIN | asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    refused = live.http.options("/v1/completions", headers=asked | {"Origin": "https://evil"})
    assert refused.status_code == 400
    for headers, status in ((AUTH, 200), ({}, 401)):
        response = live.http.post("/v1/completions", json=BODY, headers={**headers, **ORIGIN})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-credentials" not in response.headers
        assert "X-Should-Retry" in response.headers["access-control-expose-headers"]

"""Nobody holds the server longer than the configuration allows."""

from __future__ import annotations

import socket
import time

import httpx
import pytest

from server.config import HttpConfig
from server.serve import DrainingServer
from tests.api.conftest import Live
from tests.api.test_errors import error_of
from tests.support.api import MODEL
from tests.support.live_server import wait_until
from tests.support.sse import parse

BODY = {"model": MODEL, "prompt": "1", "max_tokens": 250, "ignore_eos": True}


def connect(live: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(live.url).port or 0), 10)


def test_a_request_that_takes_too_long_ends_with_an_error(start) -> None:
    live = start(http={"request_seconds": 0.4}, engine={"max_sequences": 1})
    live.table.set_pace(0.02)
    started = time.monotonic()
    whole = live.post(**BODY)
    assert whole.status_code == 504
    assert error_of(whole)["code"] == "timeout"
    assert "0.4 seconds" in error_of(whole)["message"]
    *chunks, last = parse(live.post(stream=True, **BODY).content)
    assert chunks
    assert last["error"]["code"] == "timeout"
    assert time.monotonic() - started < 5
    live.wait_idle()
    finished = {"endpoint": "completions", "reason": "timeout"}
    wait_until(lambda: live.table.value("cos_requests_finished_total", **finished) == 2)


def test_time_in_the_queue_counts(start) -> None:
    live = start(http={"request_seconds": 0.5}, engine={"max_sequences": 1})
    live.table.set_pace(0.1)
    with live.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as first:
        next(first.iter_raw())
        assert live.post(**BODY).status_code == 504
    live.wait_idle()


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_body_that_comes_too_slowly_is_refused(start, path: str) -> None:
    live = start(http={"body_seconds": 0.3})
    with connect(live) as client:
        head = f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
        answer = b""
        while piece := client.recv(65536):
            answer += piece
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"request_timeout" in answer
    assert live.table.value("cos_requests_rejected_total", reason="too_slow") == 1


def test_a_client_that_does_not_read_holds_nobody_up(start) -> None:
    live = start(http={"send_seconds": 0.5})
    # The sockets' buffers hold little, so the answer piles up in the server.
    body = '{"model": "table", "prompt": "1", "n": 2, "max_tokens": 250, "ignore_eos": true, '
    body += '"stream": true, "logprobs": 20}'
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", httpx.URL(live.url).port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        wait_until(lambda: live.table.engine.has_work)
        started = time.monotonic()
        assert live.complete(max_tokens=20)
        assert time.monotonic() - started < 5
        wait_until(lambda: live.table.service.clients.num_open == 0, 20)
        live.wait_idle()


def test_a_client_that_leaves_within_its_body_is_no_error_of_the_server(start) -> None:
    live = start()
    with connect(live) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{")
    counted = {"route": "/v1/completions", "method": "POST"}
    name = "cos_http_requests_total"
    wait_until(lambda: live.table.value(name, status="499", **counted) == 1)


def test_unused_connections_outlive_those_of_proxies(live: Live) -> None:
    """Of which usual ones keep theirs for 60 s."""
    assert DrainingServer(live.table.app, HttpConfig()).config.timeout_keep_alive > 60
    short = HttpConfig(keep_alive_seconds=5)
    assert DrainingServer(live.table.app, short).config.timeout_keep_alive == 5


def test_headers_beyond_the_limit_are_refused(live: Live) -> None:
    with connect(live) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * (1 << 20))
        assert client.recv(65536).startswith(b"HTTP/1.1 400")
    assert live.http.get("/health").status_code == 200

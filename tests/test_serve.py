"""Real processes, real signals."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import HttpConfig
from server.errors import ConfigError
from server.serve import _bind, serve
from tests.support import table_server
from tests.support.api import MODEL, make_config
from tests.support.live_server import wait_until
from tests.support.sse import parse

BODY = {"model": MODEL, "prompt": "1", "stream": True, "ignore_eos": True}


def test_connections_send_at_once() -> None:
    """What waits for acknowledgements makes each answer on a used connection 40 ms late."""
    with (
        _bind(HttpConfig(host="127.0.0.1", port=0)) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# Most of a server's start is what it imports, so all but one are forks of a process that has.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([table_server.__name__])


class Fork:
    """As much of Popen as is used here."""

    def __init__(self, options: dict[str, Any], log: Path) -> None:
        arguments = (options, dict(os.environ), log)
        self._process = FORKS.Process(target=table_server.run_forked, args=arguments)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, seconds: float | None = None) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


@dataclass
class Process:
    """A server process and what it has said."""

    popen: subprocess.Popen[bytes] | Fork
    log: Path
    http: httpx.Client = field(default_factory=httpx.Client)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def find_url(self) -> str | None:
        assert self.popen.poll() is None, self.said
        match = re.search(r"listening on (https?://\S+?),", self.said)
        return match and match[1]

    def find_metrics_url(self) -> str | None:
        match = re.search(r"metrics on (http://\S+)", self.said)
        return match and match[1]

    def is_ready(self) -> bool:
        return self.http.get("/ready").status_code == 200


def start(options: dict[str, Any], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", table_server.__name__, json.dumps(options)]
    with log.open("wb") as stream:
        return subprocess.Popen(command, stderr=stream)


@contextmanager
def process(
    folder: Path,
    start: Callable[[dict[str, Any], Path], subprocess.Popen[bytes] | Fork] = Fork,
    **options: Any,
) -> Iterator[Process]:
    server = Process(start(options, folder / "log"), folder / "log")
    try:
        wait_until(lambda: server.find_url() is not None, 60)
        server.http = httpx.Client(
            base_url=server.find_url() or "",
            timeout=20,
            verify=ssl.create_default_context(cafile=CERTIFICATE),
        )
        wait_until(server.is_ready, 60)
        yield server
    finally:
        server.popen.kill()
        server.popen.wait()
        server.http.close()


@contextmanager
def running_stream(server: Process, **body: Any) -> Iterator[Iterator[bytes]]:
    """A stream whose first tokens have come."""
    with server.http.stream("POST", "/v1/completions", json=BODY | body) as response:
        pieces = response.iter_raw()
        first = next(pieces)

        def all_pieces() -> Iterator[bytes]:
            yield first
            yield from pieces

        yield all_pieces()


HTTP = {"port": 0}
TLS = Path(__file__).parent / "support" / "tls"
CERTIFICATE, TLS_KEY = str(TLS / "localhost.crt"), str(TLS / "localhost.key")


def test_drain_lets_running_requests_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    with process(tmp_path, start, pace=0.02, http=HTTP) as server:
        with running_stream(server, max_tokens=60) as pieces:
            server.popen.send_signal(signal.SIGTERM)
            wait_until(lambda: not server.is_ready())
            with httpx.Client(base_url=server.http.base_url) as other:
                refused = other.post("/v1/completions", json=BODY)
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "unavailable"
                assert other.get("/ready").json()["phase"] == "draining"
                assert other.get("/health").status_code == 200
            chunks = parse(b"".join(pieces))
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert server.popen.wait(10) == 0
    assert "Traceback" not in server.said


def test_what_is_unfinished_at_the_end_of_the_drain_gets_an_error(tmp_path: Path) -> None:
    http = {**HTTP, "drain_seconds": 0.3}
    with process(tmp_path, pace=0.05, http=http) as server:
        with running_stream(server, max_tokens=200) as pieces:
            server.popen.send_signal(signal.SIGTERM)
            *chunks, last = parse(b"".join(pieces))
        assert chunks
        assert last["error"]["code"] == "unavailable"
        assert server.popen.wait(10) == 0


def test_a_second_signal_aborts(tmp_path: Path) -> None:
    with process(tmp_path, pace=0.05, http=HTTP) as server:
        with running_stream(server, max_tokens=200) as pieces:
            server.popen.send_signal(signal.SIGTERM)
            wait_until(lambda: not server.is_ready())
            started = time.monotonic()
            server.popen.send_signal(signal.SIGINT)
            *_, last = parse(b"".join(pieces))
        assert last["error"]["code"] == "unavailable"
        assert server.popen.wait(10) == 0
        assert time.monotonic() - started < 5


ENDLESS_LOAD = """
import sys, torch, server.app
from server.__main__ import main

def load(*args):
    sys.stderr.write("at work\\n")
    x = torch.zeros(64, 64)
    while True:
        x = torch.nn.functional.linear(x, x)

server.app.load_parts = load
sys.exit(main(["serve", "--config", "configs/default.yaml", "--set", "http.port=0"]))
"""


def test_a_signal_while_models_are_loaded_ends_the_process_well() -> None:
    command = [sys.executable, "-c", ENDLESS_LOAD]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as popen:
        assert popen.stderr is not None
        lines = iter(popen.stderr)
        try:
            awaited = {"at work", "startup complete"}
            while awaited:
                line = next(lines)
                awaited = {words for words in awaited if words not in line}
            popen.send_signal(signal.SIGTERM)
            rest = "".join(lines)
        finally:
            popen.kill()
    assert popen.returncode == 0, rest
    assert "terminate called" not in rest


def test_a_signal_before_anything_is_loaded_ends_the_process_well() -> None:
    """The first process of a container would not be ended by one that it does not take."""
    command = [sys.executable, "-m", "server", "serve", "--config", "configs/default.yaml"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as popen:
        assert popen.stderr is not None
        try:
            assert "starting smollm2-cos" in popen.stderr.readline()
            popen.send_signal(signal.SIGTERM)
            rest = popen.stderr.read()
        finally:
            popen.kill()
    assert popen.returncode == 0
    assert not rest


ENDLESS_GRAMMAR = """
import asyncio, sys, threading, time
from server.api.grammar_threads import GrammarThreads
from server.serve import finish

async def leave():
    began = asyncio.Event()
    loop = asyncio.get_running_loop()
    def read():
        loop.call_soon_threadsafe(began.set)
        time.sleep(600)
    task = asyncio.create_task(GrammarThreads(1).run(read))
    await began.wait()
    task.cancel()

asyncio.run(leave())
sys.exit(finish(3))
"""


def test_a_grammar_that_is_still_read_holds_up_no_end() -> None:
    assert subprocess.run([sys.executable, "-c", ENDLESS_GRAMMAR], timeout=60).returncode == 3


def test_a_broken_engine_ends_the_process_with_code_1(tmp_path: Path) -> None:
    with process(tmp_path, fail_after=20, pace=0.01, http=HTTP) as server:
        with running_stream(server, max_tokens=200) as pieces:
            *_, last = parse(b"".join(pieces))
        assert last["error"]["code"] == "engine_dead"
        assert server.popen.wait(10) == 1
    assert "the engine has failed" in server.said


def test_tls_keys_and_a_port_for_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "alice-0123456789abcdef"
    monkeypatch.setenv("COS_API_KEYS", f"alice:{key}")
    http = {**HTTP, "tls_certificate": CERTIFICATE, "tls_key": TLS_KEY, "metrics_port": 0}
    with process(tmp_path, http=http) as server:
        assert (server.find_url() or "").startswith("https://")
        assert server.http.get("/v1/models").status_code == 401
        server.http.headers["Authorization"] = f"Bearer {key}"
        assert server.http.get("/v1/models").status_code == 200
        assert server.http.get("/metrics").status_code == 404
        metrics = httpx.get(f"{server.find_metrics_url()}/metrics")
        assert "cos_requests_rejected_total" in metrics.text
        assert key not in metrics.text
        with pytest.raises(httpx.ConnectError):
            httpx.get(str(server.http.base_url).replace("127.0.0.1", "localhost"))
        server.http.close()  # TLS waits some seconds for idle connections to say goodbye
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(10) == 0
    assert "Traceback" not in server.said
    assert key not in server.said


@pytest.mark.parametrize(
    ("http", "named"),
    [
        ({"tls_key": TLS_KEY}, "http.tls_key needs http.tls_certificate"),
        ({"tls_certificate": "no/such.crt"}, "No such file"),
        ({"tls_certificate": TLS_KEY}, "cannot use"),
        ({"tls_certificate": CERTIFICATE, "tls_key": CERTIFICATE}, "cannot use"),
        ({"metrics_port": 0, "metrics_host": "192.0.2.1"}, "cannot listen on 192.0.2.1:0"),
        ({"keys_file": "no/such/keys"}, "http.keys_file"),
        ({"max_open_requests_per_key": 1}, "needs API keys"),
    ],
)
def test_what_cannot_be_served_securely_is_not_served(http: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        serve(make_config(http={**HTTP, **http}), load=lambda: pytest.fail("loaded"))

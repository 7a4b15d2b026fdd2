from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.support.api import MODEL, TableApp, make_table_app
from tests.support.live_server import run_server, wait_until
from tests.support.sse import parse


@dataclass
class Live:
    """A running server and a client of it.

    A request finds nothing of another in the prefix cache, unless it brings a salt of its own.
    """

    table: TableApp
    url: str
    http: httpx.Client

    def post(self, **body: Any) -> httpx.Response:
        defaults = {"model": MODEL, "prompt": "1 2", "cache_salt": secrets.token_hex(8)}
        return self.http.post("/v1/completions", json={**defaults, **body})

    def complete(self, **body: Any) -> dict[str, Any]:
        response = self.post(**body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        response = self.post(stream=True, **body)
        assert response.status_code == 200, response.text
        return parse(response.content)

    def post_chat(self, **body: Any) -> httpx.Response:
        defaults = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "1 2"}],
            "cache_salt": secrets.token_hex(8),
        }
        return self.http.post("/v1/chat/completions", json={**defaults, **body})

    def chat(self, **body: Any) -> dict[str, Any]:
        response = self.post_chat(**body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream_chat(self, **body: Any) -> list[dict[str, Any]]:
        response = self.post_chat(stream=True, **body)
        assert response.status_code == 200, response.text
        return parse(response.content)

    def wait_idle(self) -> None:
        wait_until(lambda: self.table.is_idle)
        self.table.engine.scheduler.check_integrity()


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """Two models, the default limits; shared, so tests leave it as they found it."""
    with serve(make_table_app()) as server:
        yield server


@pytest.fixture
def paced(live: Live) -> Iterator[Live]:
    """The same server, slow enough to be interrupted."""
    live.table.set_pace(0.02)
    yield live
    live.wait_idle()
    live.table.set_pace(0)


@pytest.fixture
def start() -> Iterator[Callable[..., Live]]:
    """Servers of one test alone; arguments are those of `make_table_app`."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(serve(make_table_app(**options)))


@contextmanager
def serve(table: TableApp) -> Iterator[Live]:
    with run_server(table.app) as url, httpx.Client(base_url=url, timeout=30) as http:
        yield Live(table, url, http)

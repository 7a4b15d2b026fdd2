"""Clients of all kinds for a server under observation: good, bad, hasty and rude."""

from __future__ import annotations

import random
import threading
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import httpx

_CLIENTS = 4
_COS: tuple[dict[str, Any], ...] = (
    {},
    {"strategy": "cos"},
    {"strategy": "cos", "gamma": 3},
    {"strategy": "standard"},
)


class Traffic(AbstractContextManager["Traffic"]):
    """Requests from several threads until the end of the context."""

    def __init__(self, url: str, clients: int = _CLIENTS) -> None:
        self._url = url
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(seed,), daemon=True) for seed in range(clients)
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, seed: int) -> None:
        choose = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=120) as http:
            model = self._model(http)
            while not self._stop.is_set():
                try:
                    self._request(http, choose, model)
                except httpx.HTTPError:
                    self._stop.wait(0.5)  # the server is starting or going

    def _model(self, http: httpx.Client) -> str:
        """The served name; asked for again and again while models load."""
        while not self._stop.is_set():
            try:
                http.post("/v1/completions", json={"prompt": "x", "model": "x"})
                return str(http.get("/v1/models").raise_for_status().json()["data"][0]["id"])
            except (httpx.HTTPError, LookupError):
                self._stop.wait(0.5)
        return ""

    def _request(self, http: httpx.Client, choose: random.Random, model: str) -> None:
        body: dict[str, Any] = {
            "model": model,
            "prompt": f"Count from {choose.randrange(100)}: "
            + "one two three " * choose.randrange(9),
            "max_tokens": choose.randrange(4, 40),
            "temperature": choose.choice((0, 1)),
            "cos": choose.choice(_COS),
        }
        kind = choose.random()
        if kind < 0.1:
            http.post("/v1/completions", json={**body, "temperature": 99})
        elif kind < 0.2:
            http.get("/no-such-page")
        elif kind < 0.3:
            self._leave_early(http, body)
        else:
            http.post("/v1/completions", json={**body, "stream": choose.random() < 0.5})

    def _leave_early(self, http: httpx.Client, body: dict[str, Any]) -> None:
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
            next(reply.iter_bytes(), None)

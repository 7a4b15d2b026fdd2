"""Who calls, and how much each may ask for at once and over time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from fastapi import Request

from server.config import HttpConfig
from server.errors import RateLimited

ANONYMOUS = "anonymous"
SCOPE_KEY = "cos_client"
_MINUTE = 60.0


class Client:
    """One key's name: its open requests, and a leaky bucket of the tokens it has used.

    Tokens are charged when they are there, not when they are asked for: nobody knows beforehand
    how long a text gets. The bucket may so run over by what is open, and then takes no new request
    until it has leaked to its rim.
    """

    def __init__(
        self, name: str, tokens_per_minute: int | None, clock: Callable[[], float]
    ) -> None:
        self.name = name
        self.num_open = 0
        self._capacity = tokens_per_minute
        self._clock = clock
        self._level = 0.0
        self._leaked_at = clock()

    def charge(self, num_tokens: int) -> None:
        """Count tokens read or generated for this client."""
        if self._capacity is not None:
            self._leak(self._capacity)
            self._level += num_tokens

    def refund(self, num_tokens: int) -> None:
        """Take back a charge made just now."""
        self._level = max(0.0, self._level - num_tokens)

    def seconds_to_wait(self) -> float:
        """Until a new request may come; 0 where it may now."""
        if self._capacity is None:
            return 0.0
        self._leak(self._capacity)
        # A full bucket waits too: the smallest request needs a token.
        over = self._level + 1 - self._capacity
        return max(0.0, over * _MINUTE / self._capacity)

    def _leak(self, capacity: int) -> None:
        now = self._clock()
        self._level = max(0.0, self._level - (now - self._leaked_at) * capacity / _MINUTE)
        self._leaked_at = now


class Clients:
    """All of them; lives on the event loop's thread."""

    def __init__(
        self, names: Iterable[str], http: HttpConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_open = http.max_open_requests
        self._max_open_per_key = http.max_open_requests_per_key
        tokens_per_minute = http.tokens_per_minute_per_key
        self._clients = {name: Client(name, tokens_per_minute, clock) for name in names}

    def __getitem__(self, name: str) -> Client:
        return self._clients[name]

    @property
    def num_open(self) -> int:
        return sum(client.num_open for client in self._clients.values())

    @contextmanager
    def place(self, client: Client) -> Iterator[None]:
        """Hold a place for one request from its head to the last byte of its answer."""
        client.num_open += 1
        try:
            yield
        finally:
            client.num_open -= 1

    def check(self, client: Client) -> None:
        """Whether a request of this client may come in.

        Raises:
            RateLimited: there is none, or the client has used up its tokens.
        """
        if self.num_open >= self._max_open:
            raise RateLimited(
                f"{self.num_open} requests are open, and this server's limit is {self._max_open}",
                "too_many_requests",
            )
        limit = self._max_open_per_key
        if limit is not None and client.num_open >= limit:
            raise RateLimited(
                f"{client.num_open} requests of this API key are open, and its limit is {limit}",
                "too_many_requests",
            )
        if seconds := client.seconds_to_wait():
            raise RateLimited(
                "this API key has used up its tokens per minute",
                "rate_limit_exceeded",
                math.ceil(seconds),
            )


def client_of(request: Request) -> Client:
    client: Client = request.scope[SCOPE_KEY]
    return client

"""Streams at the level of ASGI messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message, Scope

from server.api.sse import DONE, EventStream

pytestmark = pytest.mark.anyio
SCOPE: Scope = {"type": "http", "method": "POST", "path": "/", "headers": []}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_nothing_follows_the_end_of_a_stream() -> None:
    """As a ping that falls between the last event and the connection's end would."""
    sent: list[bytes] = []

    async def events() -> AsyncGenerator[bytes]:
        yield b"data: {}\n\n"
        yield DONE
        yield b": ping\n\n"

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))

    async def close() -> None:
        sent.append(b"closed")

    stream = EventStream(events(), close, ping_seconds=15, send_seconds=60)
    await stream({**SCOPE}, _never, send)
    assert sent == [b"", b"data: {}\n\n", DONE, b"", b"closed"]


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError

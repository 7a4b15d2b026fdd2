"""Reading request bodies, and getting rid of them, within bounds of size and time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from starlette.types import Message, Receive

# A body above the limit is read and dropped up to so many times the limit: a connection that is
# closed with data unread is reset, and its client would never see the answer.
_DISCARDED = 4
_DISCARD_SECONDS = 5.0


class BodyTooLarge(Exception):
    pass


class ClientGone(Exception):
    pass


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: it has more than `max_bytes`; most of it has been read.
        ClientGone: it will never be complete.
    """
    body = bytearray()
    num_bytes = 0
    async for piece in _pieces(receive, _DISCARDED * max_bytes):
        num_bytes += len(piece)
        if num_bytes <= max_bytes:
            body += piece
        else:
            body.clear()
    if num_bytes > max_bytes:
        raise BodyTooLarge
    return bytes(body)


async def discard_body(receive: Receive, max_bytes: int) -> None:
    """Read and drop what there is of a body that nobody wants, so that the answer gets through."""
    with suppress(ClientGone, TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for _ in _pieces(receive, _DISCARDED * max_bytes):
                pass


async def _pieces(receive: Receive, most: int) -> AsyncIterator[bytes]:
    """A body as it comes, until it ends or `most` bytes are exceeded. Raises ClientGone."""
    num_bytes, is_last = 0, False
    while not is_last and num_bytes <= most:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece: bytes = message.get("body", b"")
        num_bytes += len(piece)
        is_last = not message.get("more_body", False)
        yield piece


def replay(body: bytes, receive: Receive) -> Receive:
    """`receive` as if the body had not been read, in one message."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed

"""Server-sent events: `data: {json}` and an empty line, `data: [DONE]` at the end."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus, SendTimeoutError
from starlette.types import Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def event(body: BaseModel) -> bytes:
    """One event; fields that were not set stay out."""
    return b"data: " + body.model_dump_json(exclude_unset=True).encode() + b"\n\n"


class EventStream(EventSourceResponse):
    """A stream of encoded events that always closes what feeds it."""

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        close: Callable[[], Awaitable[None]],
        ping_seconds: int,
        send_seconds: float,
    ) -> None:
        """`close` runs last, even where the client left before the first event was sent.

        A client that takes nothing for `send_seconds` is disconnected.
        """
        super().__init__(
            events,
            ping=ping_seconds,
            send_timeout=send_seconds,
            sep="\n",  # the library's default, CRLF, breaks clients that split at "\n\n"
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_done = False

        async def send_until_done(message: Message) -> None:
            # The library's pings go on while the stream is being closed.
            nonlocal is_done
            body = message.get("body", b"")
            if not (is_done and body):
                is_done = is_done or body.endswith(DONE)
                await send(message)

        try:
            await super().__call__(scope, receive, send_until_done)
        except* SendTimeoutError:
            logger.warning("a client left its stream unread and was disconnected")
        finally:
            await self._close()


def outlive_shutdown_signals() -> None:
    """Keep sse-starlette from cutting every stream at SIGTERM.

    It replaces uvicorn's signal handler and ends all streams at once, which would defeat a drain;
    here the end of the drain ends the engine, and so the streams, with an error event.
    """
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]

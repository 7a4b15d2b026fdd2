"""Server-sent events of a completion stream -> JSON objects."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from server.bench.row import RequestFailed

_DONE = "[DONE]"


async def read_events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """The `data` of each event until `[DONE]`.

    Comments (pings) and other fields are skipped. Raises RequestFailed for anything that is no
    JSON object, and for a stream that ends early: half an answer must not count as one.
    """
    data: list[str] = []
    async for line in lines:
        if line:
            field, _, value = line.partition(":")
            if field == "data":
                data.append(value.removeprefix(" "))
            continue
        if not data:
            continue
        text, data = "\n".join(data), []
        if text == _DONE:
            return
        yield _parse(text)
    raise RequestFailed("the stream ended without [DONE]")


def _parse(text: str) -> dict[str, Any]:
    try:
        event = json.loads(text)
    except ValueError:
        raise RequestFailed(f"not JSON in the stream: {text[:200]!r}") from None
    if not isinstance(event, dict):
        raise RequestFailed(f"not an object in the stream: {text[:200]!r}")
    return event

"""A strict reader of server-sent events as completions send them."""

from __future__ import annotations

import json
from typing import Any


def parse(raw: bytes) -> list[dict[str, Any]]:
    """The JSON of every event; asserts the framing, byte by byte, and the final [DONE]."""
    assert b"\r" not in raw
    assert raw.endswith(b"\n\n")
    events = []
    blocks = raw.decode("utf-8").removesuffix("\n\n").split("\n\n")
    assert blocks[-1] == "data: [DONE]"
    for block in blocks[:-1]:
        if block.startswith(":"):
            continue
        assert block.startswith("data: ")
        assert "\n" not in block
        events.append(json.loads(block.removeprefix("data: ")))
    return events


def texts(events: list[dict[str, Any]]) -> dict[int, str]:
    """The text of each choice."""
    whole: dict[int, str] = {}
    for event in events:
        for choice in event.get("choices", ()):
            whole[choice["index"]] = whole.get(choice["index"], "") + choice["text"]
    return whole

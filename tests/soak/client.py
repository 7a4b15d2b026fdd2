"""Sends one request and reads what comes back as strictly as it can be read."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from typing import Any

import httpx

from tests.soak.workload import COMPLETIONS, INVALID, Job
from tests.support.sse import parse

Texts = dict[int, tuple[str, str]]  # by choice: its text, and why it ended


class Corrupt(Exception):
    """An answer that no correct server gives."""


async def finish(http: httpx.AsyncClient, job: Job, *, is_stream: bool) -> Texts | None:
    """Texts and reasons by choice; None where the server was full. Raises Corrupt."""
    response = await http.post(job.url, json={**job.body, "stream": is_stream})
    if response.status_code == 429:
        if "retry-after" not in response.headers:
            raise Corrupt("429 without Retry-After")
        return None
    if response.status_code != 200:
        raise Corrupt(f"{response.status_code}: {response.text[:300]}")
    try:
        found = _of_stream(response.content) if is_stream else _of_body(response.json())
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise Corrupt(f"unreadable: {error!r}: {response.content[-300:]!r}") from error
    if set(found) != set(range(job.body["n"])):
        raise Corrupt(f"choices {sorted(found)} of {job.body['n']}")
    return found


async def leave(http: httpx.AsyncClient, job: Job, rng: random.Random) -> None:
    """Begin a request, streamed or not, and hang up at some moment."""
    is_stream = rng.random() < 0.7
    num_pieces = rng.randrange(6) if is_stream else 0
    try:
        async with asyncio.timeout(rng.expovariate(5)):
            body = {**job.body, "stream": is_stream}
            async with http.stream("POST", job.url, json=body) as response:
                pieces = response.aiter_raw()
                for _ in range(num_pieces):
                    if await anext(pieces, None) is None:
                        return
    except TimeoutError:
        pass


async def refuse(http: httpx.AsyncClient, rng: random.Random) -> None:
    """Send what must be refused. Raises Corrupt."""
    body, status = rng.choice(INVALID)
    headers = {"content-type": "application/json"}
    if isinstance(body, bytes):
        response = await http.post(COMPLETIONS, content=body, headers=headers)
    else:
        response = await http.post(COMPLETIONS, json=body)
    if response.status_code not in (status, 429):
        raise Corrupt(f"{response.status_code} for {str(body)[:100]}: {response.text[:200]}")
    if set(response.json()["error"]) != {"message", "type", "param", "code"}:
        raise Corrupt(f"no error envelope: {response.text[:200]}")


def _of_body(body: dict[str, Any]) -> Texts:
    return {
        choice["index"]: (_text(choice), _reason(choice["finish_reason"]))
        for choice in body["choices"]
    }


def _of_stream(raw: bytes) -> Texts:
    texts: dict[int, str] = defaultdict(str)
    reasons: dict[int, str] = {}
    for event in parse(raw):
        for choice in event["choices"]:
            index = choice["index"]
            assert index not in reasons, "a chunk after the last"
            texts[index] += _text(choice)
            if choice["finish_reason"] is not None:
                reasons[index] = _reason(choice["finish_reason"])
    return {index: (texts[index], reasons[index]) for index in texts}


def _text(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"])
    message = choice["message"] if "message" in choice else choice["delta"]
    return str(message.get("content") or "")


def _reason(reason: str) -> str:
    assert reason in ("stop", "length"), reason
    return reason

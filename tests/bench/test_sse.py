"""Reading a stream: pings and fields skipped, damage reported."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from server.bench.row import RequestFailed
from server.bench.sse import read_events


def read(text: str) -> list[dict[str, object]]:
    async def lines() -> AsyncIterator[str]:
        for line in text.split("\n"):
            yield line

    async def collect() -> list[dict[str, object]]:
        return [event async for event in read_events(lines())]

    return asyncio.run(collect())


def test_events_until_done():
    text = 'data: {"a": 1}\n\ndata: {"a": 2}\n\ndata: [DONE]\n\ndata: {"a": 3}\n\n'
    assert read(text) == [{"a": 1}, {"a": 2}]


def test_comments_and_other_fields_are_skipped():
    assert read(': ping\n\nevent: x\nid: 1\ndata: {"a": 1}\n\n: ping\n\ndata: [DONE]\n\n') == [
        {"a": 1}
    ]


def test_data_over_several_lines_and_without_a_space():
    assert read('data:{"a":\ndata: 1}\n\ndata:[DONE]\n\n') == [{"a": 1}]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('data: {"a": 1}\n\n', "without"),
        ("data: {oops\n\ndata: [DONE]\n\n", "not JSON"),
        ("data: 3\n\ndata: [DONE]\n\n", "not an object"),
    ],
)
def test_damage_fails_the_request(text, problem):
    with pytest.raises(RequestFailed, match=problem):
        read(text)

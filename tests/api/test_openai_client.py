"""The official client against a live server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.api.conftest import Live
from tests.support.api import IMPOSSIBLE, MAX_LENGTH, MODEL
from tests.support.live_server import wait_until


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completion(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model=MODEL, prompt="1 2", max_tokens=6, n=2, seed=1, logprobs=2, logit_bias={"35": -100}
    )
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 2
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == completion.choices[0].text


def test_stream(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="1", max_tokens=20, seed=4)
    stream = client.completions.create(
        model=MODEL,
        prompt="1",
        max_tokens=20,
        seed=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        text += "".join(choice.text for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == whole.choices[0].text
    assert usage == whole.usage


def test_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": [{"type": "text", "text": "1 2"}]}],
        max_completion_tokens=12,
        seed=4,
        logprobs=True,
        top_logprobs=3,
    )
    [choice] = whole.choices
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content][:1] == [3]
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "1 2"}],
        max_completion_tokens=12,
        seed=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    deltas = [each.delta for chunk in chunks for each in chunk.choices]
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    assert chunks[-1].usage == whole.usage


def test_async_streams(live: Live) -> None:
    async def text(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt="1", max_tokens=15, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(text(client, seed % 4) for seed in range(8)))

    texts = asyncio.run(run())
    assert texts[:4] == texts[4:]
    assert len(set(texts)) > 1


def test_leaving_a_stream_early(paced: Live, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="1", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    with stream:
        next(iter(stream))
    paced.wait_idle()


def test_the_cos_object(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model=MODEL, prompt="1", extra_body={"cos": {"strategy": "speculative", "gamma": 2}}
    )
    report = completion.model_extra["cos"]  # type: ignore[index]
    assert report["strategy"] == "speculative"
    assert report["gamma"] == [2, 1]


def test_retries_of_a_full_queue(start: Callable[..., Live]) -> None:
    """The client waits as long as Retry-After says, and comes back."""
    live = start(engine={"max_sequences": 1, "max_waiting": 1})
    live.table.set_pace(0.02)
    endless = {"model": MODEL, "prompt": "1", "n": 2, "stream": True, "max_tokens": 200}
    endless["ignore_eos"] = True
    url = f"{live.url}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as hasty,
        openai.OpenAI(base_url=url, api_key="none", max_retries=2) as patient,
        ThreadPoolExecutor() as pool,
    ):
        with live.http.stream("POST", "/v1/completions", json=endless) as running:
            assert running.status_code == 200
            with pytest.raises(openai.RateLimitError) as refused:
                hasty.completions.create(model=MODEL, prompt="1")
            assert refused.value.code == "queue_full"
            assert refused.value.response.headers["retry-after"] == "1"
            retried = pool.submit(
                patient.completions.with_raw_response.create, model=MODEL, prompt="1"
            )
            wait_until(lambda: _refusals(live) == 2)
        assert retried.result().retries_taken == 1
    live.wait_idle()


def _refusals(live: Live) -> float:
    return live.table.value("cos_requests_rejected_total", reason="queue_full")


def test_async_chats_streamed_and_whole(live: Live) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            whole = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "1"}], max_tokens=9, seed=2
            )
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "1"}],
                max_tokens=9,
                seed=2,
                stream=True,
            )
            chunks = [chunk.choices[0] async for chunk in stream]
        text = "".join(choice.delta.content or "" for choice in chunks)
        assert text == whole.choices[0].message.content
        assert chunks[-1].finish_reason == whole.choices[0].finish_reason

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
def test_cancelling_an_awaited_request(paced: Live, is_stream: bool) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{paced.url}/v1", api_key="none") as client:
            body: dict[str, Any] = {"model": MODEL, "prompt": "1", "max_tokens": 250}

            async def work() -> None:
                reply = await client.completions.create(
                    **body, stream=is_stream, extra_body={"ignore_eos": True}
                )
                if isinstance(reply, openai.AsyncStream):
                    async for _ in reply:
                        pass

            task = asyncio.create_task(work())
            await asyncio.to_thread(wait_until, lambda: bool(paced.table.engine.scheduler.running))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    paced.wait_idle()


def test_a_client_that_runs_out_of_time(paced: Live) -> None:
    with (
        openai.OpenAI(
            base_url=f"{paced.url}/v1", api_key="none", max_retries=0, timeout=0.3
        ) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.completions.create(
            model=MODEL, prompt="1", max_tokens=250, extra_body={"ignore_eos": True}
        )
    paced.wait_idle()


def test_the_engine_fails_in_a_stream(start: Callable[..., Live]) -> None:
    live = start()
    live.table.runners[1].fail_after = 10
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model=MODEL, prompt="1", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        with pytest.raises(openai.APIError):
            list(stream)


def test_error_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="1")
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt=[1] * MAX_LENGTH, stream=True)
    assert bad.value.code == "context_length_exceeded"
    assert bad.value.param == "prompt"
    assert bad.value.type == "invalid_request_error"


def test_a_failed_generation_raises(live: Live, client: openai.OpenAI) -> None:
    before = _failures(live)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as error:
            client.with_options(max_retries=2).completions.create(
                model=MODEL, prompt="1", stream=stream, extra_body=IMPOSSIBLE
            )
        assert error.value.code == "generation_failed"
    assert _failures(live) == before + 2, "the client was told not to try again"


def _failures(live: Live) -> float:
    labels = {"endpoint": "completions", "reason": "error"}
    return live.table.value("cos_requests_finished_total", **labels)


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")

"""The official client against a live server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.api.conftest import Live
from tests.support.api import IMPOSSIBLE, MAX_LENGTH, MODEL


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


def test_a_failed_generation_raises(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(model=MODEL, prompt="1", stream=stream, extra_body=IMPOSSIBLE)
        assert error.value.code == "generation_failed"


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")

"""Replies that call tools, over real transformers models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator

from server.api.call_format import FORMATS
from tests.support.callers import ASK, MODEL, NAMED, REQUIRED, SCHEMAS, TOOLS, Caller, run_caller


@pytest.fixture(scope="module", params=["hermes", "hermes-special", "llama3_json"])
def caller(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Caller]:
    """Marks of calls are several tokens, or special ones, or there are none."""
    name, _, special = request.param.partition("-")
    marks = (FORMATS["hermes"].begin, FORMATS["hermes"].end) if special else ()
    with run_caller(name, tmp_path_factory.mktemp("pair"), marks) as caller:
        yield caller


def check_calls(message: dict[str, Any], names: set[str]) -> None:
    """Each by the schema of its function."""
    assert message["content"] is None
    for call in message["tool_calls"]:
        assert call["type"] == "function"
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        assert name in names
        Draft202012Validator(SCHEMAS[name]).validate(arguments)
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("strategy", ["standard", "cos"])
def test_required_calls_follow_their_schemas(caller: Caller, strategy: str) -> None:
    fields = {**REQUIRED, "n": 8, "seed": 1, "cos": {"strategy": strategy}, "max_tokens": 300}
    finished = [c for c in caller.chat(**fields) if c["finish_reason"] != "length"]
    assert finished
    for choice in finished:
        assert choice["finish_reason"] == "tool_calls"
        check_calls(choice["message"], set(SCHEMAS))


def test_one_call_where_parallel_ones_are_not_wanted(caller: Caller) -> None:
    fields = {**REQUIRED, "parallel_tool_calls": False, "temperature": 2, "seed": 1}
    choices = caller.chat(**fields, n=16)
    calls = [call for choice in choices for call in choice["message"]["tool_calls"]]
    assert {choice["finish_reason"] for choice in choices} == {"tool_calls"}
    assert len(calls) == 16
    assert {call["function"]["name"] for call in calls} == set(SCHEMAS)


def test_a_named_function_is_called_once(caller: Caller) -> None:
    for choice in caller.chat(**NAMED, n=4, seed=2, temperature=1):
        assert choice["finish_reason"] == "stop"  # as OpenAI's service has it
        check_calls(choice["message"], {"look_up"})
        assert len(choice["message"]["tool_calls"]) == 1


def test_greedy_calls_are_those_of_standard(caller: Caller) -> None:
    fields = {**REQUIRED, "temperature": 0, "return_token_ids": True}
    [standard] = caller.chat(**fields, cos={"strategy": "standard"})
    [found] = caller.chat(**fields, cos={"strategy": "cos", "gamma": 3})
    assert found["token_ids"] == standard["token_ids"]


def test_a_stream_is_the_whole_reply_in_pieces(caller: Caller) -> None:
    fields = {**REQUIRED, "n": 2, "seed": 3, "temperature": 1, "logprobs": True}
    whole = caller.chat(**fields)
    calls: dict[tuple[int, int], list[str]] = {}
    num_scores, reasons, contents = [0, 0], ["", ""], ["", ""]
    for chunk in caller.stream(**fields):
        for choice in chunk["choices"]:
            index = choice["index"]
            contents[index] += choice["delta"].get("content", "")
            for call in choice["delta"].get("tool_calls", ()):
                key = index, call["index"]
                assert ("id" in call) == (key not in calls) == ("name" in call["function"])
                name = call["function"].get("name")
                calls.setdefault(key, [name, ""])[1] += call["function"]["arguments"]
            num_scores[index] += len((choice["logprobs"] or {"content": ()})["content"])
            reasons[index] = choice["finish_reason"] or reasons[index]
    functions = {
        (choice["index"], index): [call["function"]["name"], call["function"]["arguments"]]
        for choice in whole
        for index, call in enumerate(choice["message"]["tool_calls"])
    }
    assert calls == functions
    assert contents == [choice["message"]["content"] or "" for choice in whole]
    assert reasons == [choice["finish_reason"] for choice in whole]
    assert num_scores == [len(choice["logprobs"]["content"]) for choice in whole]


def test_what_the_model_writes_by_itself(caller: Caller) -> None:
    """Its text is forced: what it is does not matter, but that nothing else demanded calls."""
    call, fields = caller.write("now", '{"x": [1]}'), {"tools": TOOLS, "temperature": 0}
    for text, content, num_calls, reason in (
        (call, None, 1, "tool_calls"),
        ("no call", "no call", 0, "stop"),
        ('{"value": 1}', '{"value": 1}', 0, "stop"),
    ):
        form = {"structured_outputs": {"choice": [text]}}
        for choice_of in ({}, {"tool_choice": "auto"}):
            [choice] = caller.chat(**fields, **form, **choice_of)
            assert choice["finish_reason"] == reason
            assert choice["message"]["content"] == content
            calls = choice["message"].get("tool_calls", [])
            assert [each["function"] for each in calls] == [
                {"name": "now", "arguments": '{"x": [1]}'}
            ] * num_calls
        for free in ({"tools": None}, {"tool_choice": "none"}):
            [choice] = caller.chat(**{**fields, **form, **free})
            assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


def test_text_may_stand_before_a_call(caller: Caller) -> None:
    call = caller.write("now", "{}")
    [choice] = caller.chat(tools=TOOLS, guided_choice=[f"the data {call}"])
    if caller.format == "hermes":
        assert choice["message"]["content"] == "the data"
        assert len(choice["message"]["tool_calls"]) == 1
    else:
        assert choice["message"]["content"] == f"the data {call}"


def test_a_call_cut_short_says_length(caller: Caller) -> None:
    [whole] = caller.chat(**NAMED, temperature=0, return_token_ids=True)
    form = FORMATS[caller.format]
    num_left_out = 3 + len("}" + form.inner + form.end)
    [choice] = caller.chat(
        **NAMED, temperature=0, max_tokens=len(whole["token_ids"]) - num_left_out
    )
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    [expected] = whole["message"]["tool_calls"]
    assert call["function"]["name"] == "look_up"
    assert expected["function"]["arguments"].startswith(call["function"]["arguments"])
    assert len(call["function"]["arguments"]) < len(expected["function"]["arguments"])


def test_the_official_client_calls_and_answers(caller: Caller) -> None:
    with openai.OpenAI(base_url=f"{caller.url}/v1", api_key="none", max_retries=0) as client:
        with client.chat.completions.stream(
            model=MODEL,
            messages=[{"role": "user", "content": "the value?"}],
            tools=TOOLS,  # type: ignore[arg-type]
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=150,
            seed=5,
        ) as stream:
            message = stream.get_final_completion().choices[0].message
        [call] = message.tool_calls or []
        assert call.function.name in SCHEMAS
        answer: dict[str, Any] = {"role": "tool", "tool_call_id": call.id, "content": "1"}
        reply = client.chat.completions.create(
            model=MODEL,
            messages=[ASK, message.to_dict(), answer],  # type: ignore[list-item]
            tools=TOOLS,  # type: ignore[arg-type]
            max_tokens=4,
        )
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 4


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "needs tools"),
        ({"tool_choice": "sometimes", "tools": TOOLS}, "tool_choice", "required"),
        (
            NAMED | {"tools": TOOLS[1:]},
            "tool_choice.function.name",
            "'look_up' is none of the tools",
        ),
        (REQUIRED | {"guided_regex": "a"}, "tool_choice", "cannot follow guided_regex"),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"uniqueItems": True}},
                    }
                ],
            },
            "tools",
            "uniqueItems",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"title": "x" * 70_000}},
                    }
                ],
            },
            "tools",
            "65536",
        ),
        (REQUIRED | {"parallel_tool_calls": 1}, "parallel_tool_calls", "boolean"),
    ],
)
def test_refusals(caller: Caller, body: dict[str, Any], param: str, words: str) -> None:
    response = caller.post(**body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]

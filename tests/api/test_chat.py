"""Bodies of /v1/chat/completions that are not streams."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.chat_protocol import MAX_MESSAGES, MAX_TOOLS
from server.api.conversation import REFUSED_IN_MESSAGES
from server.api.unsupported import REFUSED_IN_CHAT
from tests.api.conftest import Live
from tests.api.test_errors import error_of
from tests.support.api import MAX_LENGTH, VOCAB_SIZE, LetterTemplate, usage
from tests.support.live_server import wait_until

HI = {"role": "user", "content": "1 2"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}
CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_shape_of_a_body(live: Live) -> None:
    body = live.chat(max_tokens=5, ignore_eos=True)
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "table"
    assert body["usage"] == usage(4, 5)
    assert body["cos"]["strategy"] == "auto"
    [choice] = body["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason", "stop_reason"}
    assert set(choice["message"]) == {"role", "content", "refusal"}
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["refusal"] is None
    assert (choice["logprobs"], choice["finish_reason"]) == (None, "length")


def test_a_chat_is_the_completion_of_its_rendered_text(live: Live) -> None:
    """Under every option that both endpoints share."""
    options: dict[str, Any] = {
        "seed": 3,
        "n": 2,
        "max_tokens": 30,
        "temperature": 0.8,
        "top_k": 20,
        "min_p": 0.01,
        "stop": ["7 "],
        "presence_penalty": 0.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"4": 1},
        "min_tokens": 3,
        "cos": {"strategy": "speculative", "gamma": 3},
    }
    messages = [{"role": "system", "content": "5"}, HI]
    chat = live.chat(messages=messages, **options)
    text = live.complete(prompt="s 5 u 1 2 a", **options)
    assert [c["message"]["content"] for c in chat["choices"]] == [
        c["text"] for c in text["choices"]
    ]
    for key in ("finish_reason", "stop_reason"):
        assert [c[key] for c in chat["choices"]] == [c[key] for c in text["choices"]]
    assert (chat["usage"], counts(chat["cos"])) == (text["usage"], counts(text["cos"]))


def counts(report: dict[str, Any]) -> dict[str, Any]:
    """Without what the clock says."""
    return {key: value for key, value in report.items() if not key.endswith("_seconds")}


@pytest.mark.parametrize(
    ("body", "rendered"),
    [
        ({}, "u 1 2 a"),
        ({"add_generation_prompt": False}, "u 1 2"),
        ({"continue_final_message": True}, "u 1 2"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "u 1 2"),
        ({"chat_template_kwargs": {"shout": True}}, "u 1 21 2 a"),
        ({"chat_template_kwargs": {"shout": None}}, "u 1 2 a"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "1"}]}]}, "u 1 a"),
        ({"messages": [{"role": "developer", "content": "1"}]}, "s 1 a"),
        ({"messages": [{"role": "tool", "content": "1", "tool_call_id": "x"}]}, "t 1 a"),
        ({"tools": [TOOL, TOOL]}, "t t u 1 2 a"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "t u 1 2 a"),
        ({"tools": [TOOL], "tool_choice": "none"}, "u 1 2 a"),
        ({"messages": [{"role": "critic", "content": "1", "name": None}]}, "c 1 a"),
        (
            {"messages": [HI, {"role": "assistant", "content": "3", "tool_calls": None}]},
            "u 1 2 a 3 a",
        ),
    ],
)
def test_how_a_prompt_is_rendered(live: Live, body: dict[str, Any], rendered: str) -> None:
    options = {"seed": 1, "max_tokens": 10, "ignore_eos": True}
    chat = live.chat(**options, **body)
    text = live.complete(prompt=rendered, **options)
    assert chat["choices"][0]["message"]["content"] == text["choices"][0]["text"]
    assert chat["usage"] == text["usage"]


def test_max_completion_tokens_wins(live: Live) -> None:
    body = live.chat(max_completion_tokens=3, max_tokens=9, ignore_eos=True)
    assert body["usage"]["completion_tokens"] == 3


def test_without_a_length_the_context_is_filled(live: Live) -> None:
    body = live.chat(ignore_eos=True)
    assert body["usage"]["total_tokens"] == MAX_LENGTH
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("strategy", ["standard", "cos"])
def test_logprobs(live: Live, strategy: str) -> None:
    options = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "cos": {"strategy": strategy}}
    [choice] = live.chat(logprobs=True, top_logprobs=2, **options)["choices"]
    assert set(choice["logprobs"]) == {"content", "refusal"}
    entries = choice["logprobs"]["content"]
    assert len(entries) == 6
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    for entry in entries:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 2
        best = entry["top_logprobs"][0]
        assert {key: entry[key] for key in best} == best
    reference = live.complete(prompt="u 1 2 a", logprobs=2, **options)["choices"][0]["logprobs"]
    found = [entry["logprob"] for entry in entries]
    assert found == pytest.approx(reference["token_logprobs"], abs=1e-5)


def test_logprobs_without_alternatives(live: Live) -> None:
    for options in ({}, {"top_logprobs": 0}):
        [choice] = live.chat(logprobs=True, max_tokens=3, ignore_eos=True, **options)["choices"]
        assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[]] * 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "1 2"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"content": "1"}]}, "messages.0.role"),
        ({"messages": [{"role": "", "content": "1"}]}, "messages.0.role"),
        ({"messages": [HI, {"role": "user", "content": None}]}, "messages.1.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages.0.content.0.type",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "1"},
                            {"type": "input_audio", "text": "1"},
                        ],
                    }
                ]
            },
            "messages.0.content.1.type",
        ),
        ({"messages": [HI | {"tool_calls": [CALL]}]}, "messages.0.tool_calls"),
        (
            {"messages": [HI | {"tool_calls": [{"id": "x"}]}]},
            "messages.0.tool_calls.0.function",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0.content"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"tools": [TOOL] * (MAX_TOOLS + 1)}, "tools"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": 1}, "tool_choice"),
        ({"messages": [HI | {"content": "1" * ((1 << 20) + 1)}]}, "messages"),
        ({"messages": [{"role": "nobody", "content": "1"}]}, "messages"),
        ({"messages": [HI] * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": [HI] * MAX_LENGTH}, "messages"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ({"chat_template_kwargs": {"shout": [1]}}, "chat_template_kwargs.shout"),
        ({"chat_template_kwargs": {"shout": {}}}, "chat_template_kwargs.shout"),
        ({"chat_template_kwargs": {"whisper": 1}}, "chat_template_kwargs.whisper"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": {"tools": "x"}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token"),
        ({"chat_template_kwargs": {f"x{i}": 1 for i in range(17)}}, "chat_template_kwargs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "max_completion_tokens": None}, "max_tokens"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"n": 129}, "n"),
        ({"stream_options": {}}, "stream_options"),
        ({"cos": {"gama": 1}}, "cos.gama"),
        ({"cos": {"strategy": "mixture"}, "logprobs": True}, "logprobs"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    ],
)
def test_malformed_requests_are_400(live: Live, body: dict[str, Any], param: str) -> None:
    response = live.post_chat(**body)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) < 1000


@pytest.mark.parametrize("name", sorted(REFUSED_IN_CHAT))
def test_what_is_not_supported_is_refused_by_name(live: Live, name: str) -> None:
    response = live.post_chat(**{name: {"some": "value"}})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize("name", sorted(REFUSED_IN_MESSAGES))
def test_what_messages_may_not_say_is_refused_by_name(live: Live, name: str) -> None:
    for value in (None, *REFUSED_IN_MESSAGES[name]):
        assert live.post_chat(messages=[HI | {name: value}], max_tokens=1).status_code == 200
    error = error_of(live.post_chat(messages=[HI, HI | {name: ["some", "value"]}]))
    assert (error["param"], error["code"]) == (f"messages.1.{name}", "unsupported_parameter")


def test_what_asks_for_nothing_is_taken(live: Live) -> None:
    assert live.post_chat(max_tokens=1, **dict.fromkeys(REFUSED_IN_CHAT)).status_code == 200
    assert live.post_chat(max_tokens=1, top_logprobs=0, functions=[]).status_code == 200
    harmless = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none"}
    ignored = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "no_such_field": 1}
    assert live.post_chat(max_tokens=1, **harmless, **ignored).status_code == 200


def test_the_reason_of_the_template_is_told(live: Live) -> None:
    response = live.post_chat(messages=[{"role": "nobody", "content": "1"}])
    assert "nobody may not speak" in error_of(response)["message"]


def test_a_slow_template_is_given_up(start) -> None:
    live = start(http={"template_seconds": 0.05})
    for _ in range(6):  # more than there are threads for templates
        response = live.post_chat(chat_template_kwargs={"seconds": 60})
        assert response.status_code == 400
        assert "longer than 0.05 s" in error_of(response)["message"]
    assert live.complete(max_tokens=1)
    template = live.table.service.codec.chat_template
    assert isinstance(template, LetterTemplate)
    wait_until(lambda: template.num_ended == 6)


def test_context_length(live: Live) -> None:
    error = error_of(live.post_chat(messages=[HI | {"content": "1" * MAX_LENGTH}]))
    assert error["code"] == "context_length_exceeded"


def test_a_model_without_a_chat_template_says_so(start) -> None:
    live = start(has_template=False)
    response = live.post_chat()
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == ("messages", "no_chat_template")
    assert "no chat template" in error["message"]
    assert live.complete()


def test_chats_are_counted_apart(live: Live) -> None:
    labels = {"endpoint": "chat", "reason": "length"}
    before = live.table.value("cos_requests_finished_total", **labels)
    live.chat(max_tokens=2, ignore_eos=True)
    assert live.table.value("cos_requests_finished_total", **labels) == before + 1

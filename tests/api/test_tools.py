"""Tools and calls, through a template that reads them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from jinja2 import TemplateError

from server.api.chat_protocol import Conversation
from server.api.chat_template import TokenizerTemplate, Turns
from server.api.tools import check_tools, offered_tools, template_message
from server.errors import RequestError
from tests.support.tiny_models import make_tokenizer

TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }} {{ tool | tojson }}]"
    "{{ '\\n' }}{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<{{ call.function.name }} {{ call.function.arguments | tojson }}>"
    "{% endfor %}"
    "{% if message.tool_call_id %}(to {{ message.tool_call_id }}){% endif %}{{ '\n' }}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"x": [1]}, "strict": True}}
ASK = {"role": "user", "content": "?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": "ü"}'}}


@pytest.fixture(scope="module")
def template() -> TokenizerTemplate:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return TokenizerTemplate(tokenizer)


def render(template: TokenizerTemplate, **body: Any) -> str:
    conversation = Conversation.model_validate(body)
    check_tools(conversation, {"tools", "tool_calls"})
    messages = [template_message(message, message.role) for message in conversation.messages]
    return template.render(Turns(messages, False, False, offered_tools(conversation), {}))


def test_a_template_sees_tools_as_they_were_sent(template: TokenizerTemplate) -> None:
    text = render(template, messages=[ASK], tools=[TOOL])
    head, line = text.split("]\n")
    assert head.startswith("[f ")
    assert json.loads(head.removeprefix("[f ")) == TOOL
    assert line == "user: ?\n"


def test_calls_and_their_answers(template: TokenizerTemplate) -> None:
    messages = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]
    text = render(template, messages=messages)
    assert text == 'user: ?\nassistant: <f {"a": "ü"}>\ntool: 1(to c1)\n'


@pytest.mark.parametrize("arguments", ['{"cmd": "', "NaN", "x" * 1000, '"text"', "[1]", "null"])
def test_arguments_that_are_no_object_are_shown(
    template: TokenizerTemplate, arguments: str
) -> None:
    """As a model wrote them: whoever sends them back tells it of its mistake."""
    call = {"function": {"name": "f", "arguments": arguments}}
    text = render(template, messages=[{"role": "assistant", "tool_calls": [call]}])
    [written] = re.findall(r"<f (.*)>", text)
    assert json.loads(written) == {"invalid_arguments": arguments}


@pytest.mark.parametrize("arguments", ["", " \n", "{}", None])
def test_no_arguments_are_an_empty_object(
    template: TokenizerTemplate, arguments: str | None
) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    text = render(template, messages=[{"role": "assistant", "tool_calls": [call]}])
    assert "<f {}>" in text


def test_a_template_that_knows_no_tools_gets_none() -> None:
    body = {"messages": [ASK], "tools": [TOOL]}
    with pytest.raises(RequestError) as error:
        check_tools(Conversation.model_validate(body), {"messages"})
    assert error.value.param == "tools"
    check_tools(Conversation.model_validate(body | {"tool_choice": "none"}), {"messages"})


def test_templates_cannot_leave_their_sandbox() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    turns = Turns([ASK], False, False, None, {})
    with pytest.raises(TemplateError, match="unsafe"):
        TokenizerTemplate(tokenizer).render(turns)

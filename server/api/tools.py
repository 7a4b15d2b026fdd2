"""Tools and earlier calls of tools, handed to chat templates that know them.

A template that never reads tools would drop them silently, so there they are refused.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from pydantic_core import from_json

from server.api.chat_protocol import Conversation, Message, NamedTool, Tool, ToolCall
from server.errors import RequestError, UnsupportedParameter

_INVALID = "invalid_arguments"


def check_tools(conversation: Conversation, mentioned: Set[str]) -> None:
    """Raises RequestError where the template, which mentions these names, cannot take them."""
    forced_tools(conversation)
    if callable_tools(conversation) and "tools" not in mentioned:
        raise _unknown("tools")
    for index, message in enumerate(conversation.messages):
        where = f"messages.{index}"
        if message.tool_calls and "tool_calls" not in mentioned:
            raise _unknown(f"{where}.tool_calls")
        if message.content is None and not message.tool_calls:
            raise RequestError(
                f"{where}.content is required in a message without tool_calls",
                param=f"{where}.content",
            )


def callable_tools(conversation: Conversation) -> list[Tool]:
    """Those that the reply may call; none under tool_choice none."""
    return [] if conversation.tool_choice == "none" else conversation.tools or []


def forced_tools(conversation: Conversation) -> list[Tool]:
    """Those of which the reply has to call one; none where it need not.

    Raises:
        RequestError: the conversation has no such tools.
    """
    choice, tools = conversation.tool_choice, conversation.tools or []
    if choice in (None, "none", "auto"):
        return []
    if not tools:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    if not isinstance(choice, NamedTool):
        return tools
    name = choice.function.name
    named = [tool for tool in tools if tool.function.name == name]
    if not named:
        raise RequestError(
            f"tool_choice.function.name: {name[:64]!r} is none of the tools",
            param="tool_choice.function.name",
        )
    return named[:1]


def offered_tools(conversation: Conversation) -> list[dict[str, Any]] | None:
    """What the template gets."""
    tools = callable_tools(conversation)
    return [tool.model_dump(exclude_unset=True) for tool in tools] or None


def template_message(message: Message, role: str) -> dict[str, Any]:
    """One message as templates read it."""
    written: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        written["name"] = message.name
    if message.tool_call_id is not None:
        written["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        written["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return written


def _template_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {
            "name": call.function.name,
            "arguments": _template_arguments(call.function.arguments),
        },
    }


def _template_arguments(written: str | None) -> dict[str, Any]:
    """As an object: templates write JSON themselves, would quote a text, and may ask for items.

    What a model wrote is not always one, above all where the end of a reply cut it off. It is shown
    to the model as it is, under a key: a conversation that holds it has to go on.
    """
    try:
        arguments = from_json((written or "").strip() or "{}", allow_inf_nan=False)
    except ValueError:
        arguments = None
    return arguments if isinstance(arguments, dict) else {_INVALID: written}


def _unknown(field: str) -> UnsupportedParameter:
    return UnsupportedParameter(field, "is not read by the served model's chat template")

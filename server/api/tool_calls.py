"""How the reply to a request may call its tools: as it likes, or as `tool_choice` demands."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Literal

from server.api.call_format import FORMATS, CallFormat, find_format, grammar
from server.api.call_parser import CallParser
from server.api.chat_protocol import ChatCompletionRequest, NamedTool, Tool
from server.api.codec import Codec
from server.api.service import Service
from server.api.structure import Structure, find_structure
from server.api.tools import callable_tools, forced_tools
from server.errors import RequestError, UnsupportedParameter


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """What was settled before the reply begins.

    Attributes:
        format: how the model writes calls; None where none are told from text.
        most: calls to tell of; None for all.
        structure: the grammar of a reply that has to be calls.
        is_named: `tool_choice` named the function.
        shows_special: marks of calls are special tokens, which texts usually leave out.
    """

    format: CallFormat | None = None
    most: int | None = None
    structure: Structure | None = None
    is_named: bool = False
    shows_special: bool = False

    def make_parser(self) -> CallParser | None:
        """For one choice."""
        return None if self.format is None else CallParser(self.format, self.most)

    def finish_reason(
        self, reason: Literal["stop", "length"], parser: CallParser
    ) -> Literal["stop", "length", "tool_calls"]:
        """As OpenAI's: of a function that the client named, "stop"."""
        calls = reason == "stop" and parser.num_calls > 0 and not self.is_named
        return "tool_calls" if calls else reason


def plan_calls(request: ChatCompletionRequest, service: Service) -> ToolCalls:
    """For a service that is ready.

    Raises:
        RequestError: `tool_choice` asks for what tools, forms or the chat template do not allow.
    """
    tools, forced = callable_tools(request), forced_tools(request)
    form = _find_format(service) if tools else None
    if form is None:
        if forced and service.codec.chat_template is not None:
            raise UnsupportedParameter(
                "tool_choice",
                "must be none or auto: how the served model writes calls is not known "
                "(http.tool_call_parser)",
            )
        return ToolCalls()
    most = 1 if request.parallel_tool_calls is False else None
    return ToolCalls(
        format=form,
        most=most,
        structure=_structure(request, form, forced, most, service.codec) if forced else None,
        is_named=isinstance(request.tool_choice, NamedTool),
        shows_special=_is_left_out(form.begin, service.codec),
    )


def _find_format(service: Service) -> CallFormat | None:
    wanted, template = service.config.http.tool_call_parser, service.codec.chat_template
    if wanted == "off" or template is None:
        return None
    return find_format(template.source) if wanted == "auto" else FORMATS[wanted]


def _structure(
    request: ChatCompletionRequest,
    form: CallFormat,
    tools: list[Tool],
    most: int | None,
    codec: Codec,
) -> Structure:
    other = find_structure(request)
    if other is not None:
        raise RequestError(
            f"tool_choice: a reply that has to be calls cannot follow {other.field}",
            param="tool_choice",
        )
    is_one = most == 1 or isinstance(request.tool_choice, NamedTool)
    return Structure("lark", grammar(form, tools, is_one, partial(_terminal, codec)), "tools")


def _terminal(codec: Codec, mark: str) -> str:
    """Where one token stands for the mark, the grammar takes no other spelling."""
    ids = codec.encode(mark, False, "tools")
    return f"<[{ids[0]}]>" if len(ids) == 1 else json.dumps(mark)


def _is_left_out(mark: str, codec: Codec) -> bool:
    """Whether a text without special tokens lacks the mark."""
    return bool(mark) and not codec.decode(codec.encode(mark, False, "tools"), True)

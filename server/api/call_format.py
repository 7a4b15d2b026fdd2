"""How models write calls of functions in their text, and grammars of such texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence as Row
from dataclasses import dataclass
from typing import Any, Literal

from server.api.chat_protocol import Tool
from server.decoding.json_schema import relaxed

CallFormatName = Literal["hermes", "llama3_json"]

# A text as a terminal of a grammar: quoted, or the one token that stands for it.
Spell = Callable[[str], str]

_NO_PARAMETERS = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@dataclass(frozen=True, slots=True)
class CallFormat:
    """A call is a JSON object of a function's name and its arguments, between two marks.

    Attributes:
        begin: the mark before each call; empty where a reply that is such an object is a call.
        end: the mark after each call; empty together with `begin`.
        inner: white space between a mark and the object.
        separator: between two calls.
        arguments: key of the arguments as models are taught it.
    """

    begin: str
    end: str
    inner: str
    separator: str
    arguments: Literal["arguments", "parameters"]


FORMATS: dict[CallFormatName, CallFormat] = {
    # Nous Research's Hermes, Qwen2.5, Qwen3 and SmolLM3.
    "hermes": CallFormat("<tool_call>", "</tool_call>", "\n", "\n", "arguments"),
    # Llama 3.1 and 3.2.
    "llama3_json": CallFormat("", "", "", "; ", "parameters"),
}
# Keywords that say what kind of value a schema is of.
_KINDS = frozenset({"$ref", "allOf", "anyOf", "const", "enum", "oneOf", "type"})
# What their chat templates say. In some, quotes are escaped.
_ARGUMENTS = re.compile(r'"arguments\\?": ')
_PARAMETERS = re.compile(r'"parameters\\?": ')


def find_format(template: str) -> CallFormat | None:
    """The format that a chat template teaches; None where it is no known one."""
    if "<tool_call>" in template and _ARGUMENTS.search(template):
        return FORMATS["hermes"]
    if "ipython" in template and _PARAMETERS.search(template):
        return FORMATS["llama3_json"]
    return None


def grammar(form: CallFormat, tools: Row[Tool], is_one_call: bool, spell: Spell) -> str:
    """Texts that are calls of `tools` and nothing else, in llguidance's dialect of Lark.

    Arguments are an object that follows the schema of its function; without one it is empty.
    """
    begin, end = (spell(mark) if mark else "" for mark in (form.begin, form.end))
    inner = json.dumps(form.inner) if form.inner else ""
    more = "" if is_one_call else f"({json.dumps(form.separator)} call)*"
    names = [f"function{index}" for index in range(len(tools))]
    rules = [
        f"start: call {more}",
        f"call: {begin} {inner} ({' | '.join(names)}) {inner} {end}",
    ]
    for name, tool in zip(names, tools, strict=True):
        head = f'{{"name": {json.dumps(tool.function.name)}, "{form.arguments}": '
        rules.append(f'{name}: {json.dumps(head)} {name}_arguments "}}"')
        # A document of its own: a reference within a schema begins at that schema's root.
        written = json.dumps(_arguments_schema(tool.function.parameters))
        rules.append(f"{name}_arguments: %json {relaxed(written)}")
    return "\n".join(rules)


def _arguments_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Of an object: schemas that leave that open mean one."""
    if not parameters:
        return _NO_PARAMETERS
    return parameters if _KINDS & parameters.keys() else {"type": "object", **parameters}

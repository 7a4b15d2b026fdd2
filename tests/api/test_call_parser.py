"""Calls told from what is said, however the text is cut."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from server.api.call_format import FORMATS, CallFormatName
from server.api.call_parser import CallDelta, CallParser, Reading

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}"}]}}\n</tool_call>'
ARGUMENTS = '{"a": [1, {"b": "}"}]}'
LLAMA = '{"name": "f", "parameters": {"a": [1, {"b": "}"}]}}'


@dataclass
class Told:
    """A whole reply, put together as a client does."""

    content: str
    calls: list[tuple[str, str]]

    @classmethod
    def of(cls, readings: Iterable[Reading]) -> Told:
        told = cls("", [])
        ids: set[str] = set()
        for reading in readings:
            told.content += reading.content
            indices = [delta.index for delta in reading.calls]
            assert len(set(indices)) == len(indices)
            for delta in reading.calls:
                told._add(delta, ids)
        return told

    def _add(self, delta: CallDelta, ids: set[str]) -> None:
        if delta.index == len(self.calls):
            assert delta.id is not None
            assert delta.id not in ids
            assert delta.name is not None
            ids.add(delta.id)
            self.calls.append((delta.name, delta.arguments))
            return
        assert delta.index == len(self.calls) - 1
        assert (delta.id, delta.name) == (None, None)
        name, arguments = self.calls[-1]
        self.calls[-1] = (name, arguments + delta.arguments)


def read(name: CallFormatName, pieces: Iterable[str], most: int | None = None) -> Told:
    parser = CallParser(FORMATS[name], most)
    parts = list(pieces)
    readings = [parser.feed(part, False) for part in parts[:-1]]
    readings.append(parser.feed(parts[-1], True))
    return Told.of(readings)


HERMES: list[tuple[str, str, list[tuple[str, str]]]] = [
    # No calls: as it is, to the last space.
    ("", "", []),
    ("  Hello < world <tool \n", "  Hello < world <tool \n", []),
    ("Write <tool_call> before it.", "Write <tool_call> before it.", []),
    ("a <tool_call>\n  [1]</tool_call> b", "a <tool_call>\n  [1]</tool_call> b", []),
    # One call, several, and text around them.
    (CALL, "", [("f", ARGUMENTS)]),
    (f"{CALL}\n{CALL}", "", [("f", ARGUMENTS), ("f", ARGUMENTS)]),
    (f"{CALL}{CALL}\n", "", [("f", ARGUMENTS), ("f", ARGUMENTS)]),
    (f"Let me see.\n\n{CALL}", "Let me see.", [("f", ARGUMENTS)]),
    (
        f" {CALL} \n and then {CALL} done ",
        " \n and then done",
        [("f", ARGUMENTS), ("f", ARGUMENTS)],
    ),
    # Other orders and spellings.
    ('<tool_call>{"arguments": {"x": 1}, "name": "g"}</tool_call>', "", [("g", '{"x":1}')]),
    ('<tool_call>{"name":"g","parameters":{}}</tool_call>', "", [("g", "{}")]),
    ('<tool_call>{"name": "g", "arguments": "{}"}</tool_call>', "", [("g", "{}")]),
    ('<tool_call>{"name": "g", "arguments": null}</tool_call>', "", [("g", "null")]),
    ('<tool_call>{"name": "\\u00fc\\"", "arguments": {}}</tool_call>', "", [('ü"', "{}")]),
    ('<tool_call>{"name": "g", "arguments": {}, "id": 3}</tool_call>', "", [("g", "{}")]),
    # A mark within a string is none.
    (
        '<tool_call>{"name": "g", "arguments": {"x": "</tool_call>\\"<tool_call>{"}}</tool_call>',
        "",
        [("g", '{"x": "</tool_call>\\"<tool_call>{"}')],
    ),
    # Forgotten brackets and marks.
    ('<tool_call>{"name": "g", "arguments": {}</tool_call>!', "!", [("g", "{}")]),
    ('<tool_call>{"name": "g", "arguments": {}}', "", [("g", "{}")]),
    ('<tool_call>{"name": "g", "arguments": {}} Hi', "Hi", [("g", "{}")]),
    # Cut short: what has come of the arguments, or text.
    ('<tool_call>{"name": "g", "arguments": {"x": "ab', "", [("g", '{"x": "ab')]),
    ('<tool_call>{"name": "g", "argum', '<tool_call>{"name": "g", "argum', []),
    ("Yes \n<tool_call>\n", "Yes \n<tool_call>\n", []),
    (f"{CALL}\n<tool_call>", "\n<tool_call>", [("f", ARGUMENTS)]),
    # JSON, but no call; no JSON.
    ('<tool_call>{"n": 1}</tool_call>', '<tool_call>{"n": 1}</tool_call>', []),
    ('<tool_call>{"name": 1, "arguments": {}}', '<tool_call>{"name": 1, "arguments": {}}', []),
    ('<tool_call>{"name": "", "arguments": {}}', '<tool_call>{"name": "", "arguments": {}}', []),
    ('<tool_call>{"name": "g"}', '<tool_call>{"name": "g"}', []),
    (
        '<tool_call>{"name": "g\n", "arguments": {}}',
        '<tool_call>{"name": "g\n", "arguments": {}}',
        [],
    ),
    (
        '<tool_call>{"name": "g", "arguments": [}]}',
        '<tool_call>{"name": "g", "arguments": [}]}',
        [],
    ),
]
LLAMA3: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("", "", []),
    (" \n", " \n", []),
    ("Hello {", "Hello {", []),
    (f"Sure: {LLAMA}", f"Sure: {LLAMA}", []),
    (LLAMA, "", [("f", ARGUMENTS)]),
    (f" \n{LLAMA}\n", "", [("f", ARGUMENTS)]),
    (f"<|python_tag|>{LLAMA}", "", [("f", ARGUMENTS)]),
    (f"<|python_tag|> {LLAMA}; {LLAMA}", "", [("f", ARGUMENTS), ("f", ARGUMENTS)]),
    (f"{LLAMA}; what", "what", [("f", ARGUMENTS)]),
    ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("<|python", "<|python", []),
    (
        '{"type": "function", "name": "g", "parameters": {"x": 1}}',
        "",
        [("g", '{"x":1}')],
    ),
    ('{"name": "Ada", "born": 1815}', '{"name": "Ada", "born": 1815}', []),
    (' {"name": "Ada", ', ' {"name": "Ada", ', []),
    (f'{{"a": 1}} {LLAMA}', f'{{"a": 1}} {LLAMA}', []),
]
CASES = [("hermes", *case) for case in HERMES] + [("llama3_json", *case) for case in LLAMA3]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_what_a_reply_says_and_calls(
    form: CallFormatName, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    told = read(form, [text])
    assert told == Told(content, calls)
    assert read(form, [*text, ""]) == told  # one character after the other
    generator = random.Random(len(text))
    for _ in range(20):
        cuts = sorted(generator.choices(range(len(text) + 1), k=3))
        places = [0, *cuts, len(text)]
        assert read(form, [text[a:b] for a, b in itertools.pairwise(places)]) == told


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = CallParser(FORMATS["hermes"])
    begun = parser.feed('Yes.\n<tool_call>\n{"name": "f", "arguments": {"a', False)
    [first] = begun.calls
    assert (begun.content, first.index, first.name, first.arguments) == ("Yes.", 0, "f", '{"a')
    assert parser.feed('": 1', False) == Reading("", (CallDelta(0, '": 1'),))
    assert parser.feed("}}\n</tool", False) == Reading("", (CallDelta(0, "}"),))
    assert parser.feed("_call>", True) == Reading("", ())


def test_text_is_held_back_only_while_it_may_begin_a_call() -> None:
    parser = CallParser(FORMATS["hermes"])
    said = [parser.feed(text, False).content for text in ("a ", "b <", "tool", "s> ", "c")]
    assert said == ["a", " b", "", " <tools>", " c"]


def test_further_calls_than_asked_for_are_dropped() -> None:
    for pieces in ([f"{CALL}\n{CALL} end"], [*f"{CALL}\n{CALL} end"]):
        assert read("hermes", pieces, most=1) == Told(" end", [("f", ARGUMENTS)])


@pytest.mark.parametrize("junk", ["{" * 20_000, '"' + "x" * 20_000, '{"name": "' + "y" * 20_000])
def test_what_never_becomes_a_call_is_text_and_takes_no_time(junk: str) -> None:
    """Each character is looked at a few times, not as often as there are characters."""
    text = f"<tool_call>{junk}"
    assert read("hermes", [*text]) == Told(text, [])


def test_a_head_too_long_to_be_looked_for_is_read_at_the_end() -> None:
    name = "n" * 2000
    text = f"<tool_call>{json.dumps({'name': name, 'arguments': {}})}</tool_call>"
    for pieces in ([text], [*text]):
        assert read("hermes", pieces) == Told("", [(name, "{}")])

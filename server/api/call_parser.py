"""Calls of functions in a reply's text, told from what is said as the text comes.

What is told does not depend on how the text is cut into pieces, and a text without calls is told
as it is. What looks like a call and is none (no JSON, no name) is text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from pydantic_core import from_json, to_json

from server.api.call_format import CallFormat

# Of built-in tools; models put it before other calls too.
_PYTHON_TAG = "<|python_tag|>"
# The usual order of a call's keys, in which arguments can be passed on as they come.
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_MOST_HEAD = 1024  # characters in which a call's head is looked for
_OPENING, _CLOSING = "{[", "}]"


@dataclass(frozen=True, slots=True)
class CallDelta:
    """Some of one call, or all of it.

    Attributes:
        index: of the call in its reply.
        arguments: JSON, or the next part of it.
        id: with the first delta of a call.
        name: with the first delta of a call.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a piece of text turned out to be.

    Attributes:
        content: what is said.
        calls: at most one delta for each call.
    """

    content: str
    calls: tuple[CallDelta, ...]


class CallParser:
    """Reads one reply. Text is held back while it may yet belong to a call."""

    def __init__(self, form: CallFormat, most_calls: int | None = None) -> None:
        """`most_calls` are told of, further ones are dropped; None for all."""
        self._form = form
        self._most_calls = most_calls
        self.num_calls = 0
        self._text = ""  # that has come and is not read yet
        self._skipped = ""  # what led into the present call: it is text if that is none
        self._brackets = _Brackets()
        self._num_scanned = 0  # characters of the text that the brackets have seen
        self._said: list[str] = []
        self._called: list[CallDelta] = []
        # Reads on; False where it needs more text.
        self._read: Callable[[], bool] = self._between if form.begin else self._opening

    def feed(self, text: str, is_last: bool) -> Reading:
        """Read on. `is_last`: the reply ends here."""
        self._text += text
        while self._read():
            pass
        if is_last:
            self._finish()
        reading = Reading("".join(self._said), tuple(_merged(self._called)))
        self._said, self._called = [], []
        return reading

    def _opening(self) -> bool:
        """Where a reply is either calls or text."""
        text = self._text.lstrip()
        if _PYTHON_TAG.startswith(text):
            return False
        call = text.removeprefix(_PYTHON_TAG).lstrip()
        if not call and text:
            return False
        if call.startswith("{"):
            self._enter(len(self._text) - len(call), 0)
        else:
            self._read = self._plain
        return True

    def _plain(self) -> bool:
        """Text with no more calls."""
        self._say(len(self._text))
        return False

    def _between(self) -> bool:
        """Up to the next mark; white space before it belongs to it."""
        begin = self._form.begin
        place = self._text.find(begin)
        if place < 0:
            self._say(len(self._text) - _num_held(self._text, begin))
            return False
        self._say(len(self._text[:place].rstrip()))
        self._enter(self._text.index(begin), len(begin))
        return True

    def _enter(self, place: int, mark: int) -> None:
        """A call may begin after the mark of so many characters at `place`."""
        self._skipped, self._text = self._text[: place + mark], self._text[place + mark :]
        self._brackets, self._num_scanned = _Brackets(), 0
        self._read = self._head

    def _head(self) -> bool:
        """Up to the arguments, or, in another order of keys, up to the object's end."""
        start = self._text.lstrip()[:1]
        if start not in ("", "{"):
            return self._leave_as_text(0)
        is_new = self._num_scanned < _MOST_HEAD  # else it was looked for in all of them
        match = _HEAD.match(self._text[:_MOST_HEAD]) if is_new else None
        if match and (name := _read_name(match[1])):
            self._brackets.find_end(self._text[: match.end()], self._num_scanned, 0)
            self._text = self._text[match.end() :]
            self._begin_call(name)
            self._read = self._arguments
            return True
        end = self._brackets.find_end(self._text, self._num_scanned, 0)
        if end is None:
            self._num_scanned = len(self._text)
            return False
        return self._whole(end)

    def _whole(self, end: int) -> bool:
        """An object that has come entirely."""
        call = _read_call(self._text[:end])
        if call is None:
            return self._leave_as_text(end)
        self._text = self._text[end:]
        name, arguments = call
        self._begin_call(name)
        self._pass_on(arguments)
        self._read = self._after
        return True

    def _arguments(self) -> bool:
        end = self._brackets.find_end(self._text, 0, 1)
        self._pass_on(self._text[:end])
        self._text = "" if end is None else self._text[end:]
        self._read = self._arguments if end is None else self._tail
        return end is not None

    def _tail(self) -> bool:
        """From the arguments to the object's end."""
        end = self._brackets.find_end(self._text, 0, 0)
        self._text = "" if end is None else self._text[end:]
        self._read = self._tail if end is None else self._after
        return end is not None

    def _after(self) -> bool:
        """From a call to its mark, or to another call."""
        if not self._form.end:
            self._text = self._text.lstrip("; \n\t")
            if self._text:
                self._read = self._plain
                if self._text[0] == "{":
                    self._enter(0, 0)
            return bool(self._text)
        text = self._text.lstrip()
        if len(text) < len(self._form.end) and self._form.end.startswith(text):
            return False
        self._text = text.removeprefix(self._form.end)
        self._read = self._between
        return True

    def _finish(self) -> None:
        if self._read == self._head:
            self._leave_as_text(len(self._text))
        elif self._read in (self._opening, self._between):
            self._say(len(self._text.rstrip() if self.num_calls else self._text))

    def _leave_as_text(self, count: int) -> bool:
        """What was taken for a call is none, nor are the next `count` characters."""
        self._said.append(self._skipped)
        self._say(count)
        self._read = self._between if self._form.begin else self._plain
        return True

    def _say(self, count: int) -> None:
        self._said.append(self._text[:count])
        self._text = self._text[count:]

    def _begin_call(self, name: str) -> None:
        if self._is_told(self.num_calls):
            id_ = f"call_{secrets.token_hex(12)}"
            self._called.append(CallDelta(self.num_calls, "", id_, name))
        self.num_calls += 1

    def _pass_on(self, arguments: str) -> None:
        if arguments and self._is_told(self.num_calls - 1):
            self._called.append(CallDelta(self.num_calls - 1, arguments))

    def _is_told(self, index: int) -> bool:
        return self._most_calls is None or index < self._most_calls


class _Brackets:
    """Counts those of JSON that comes in pieces; within strings they do not count."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_string = False
        self._is_escaped = False

    def find_end(self, text: str, start: int, depth: int) -> int | None:
        """Read `text[start:]`, to behind the bracket that leaves `depth` open.

        None where it does not come. A "<" outside of strings, where JSON has none, is an end too:
        a mark follows, and a bracket was forgotten.
        """
        for index in range(start, len(text)):
            character = text[index]
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_string:
                self._is_escaped = character == "\\"
                self._is_string = character != '"'
            elif character == "<":
                return index
            elif character == '"':
                self._is_string = True
            elif character in _OPENING:
                self._depth += 1
            elif character in _CLOSING:
                self._depth -= 1
                if self._depth <= depth:
                    return index + 1
        return None


def _num_held(text: str, mark: str) -> int:
    """Characters at the end of `text` that may be white space before `mark`, or begin it."""
    lengths = range(min(len(mark) - 1, len(text)), 0, -1)
    begun = next((length for length in lengths if text.endswith(mark[:length])), 0)
    return len(text) - len(text[: len(text) - begun].rstrip())


def _read_name(text: str) -> str | None:
    """What is written in quotes."""
    try:
        name: str = from_json(text)
    except ValueError:
        return None
    return name


def _read_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a whole call."""
    try:
        call = from_json(text, allow_inf_nan=False)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str) or not name:
        return None
    for key in ("arguments", "parameters"):
        if key in call:
            arguments = call[key]
            return name, arguments if isinstance(arguments, str) else to_json(arguments).decode()
    return None


def _merged(deltas: list[CallDelta]) -> list[CallDelta]:
    """Those of one call as one."""
    merged: list[CallDelta] = []
    for delta in deltas:
        if merged and merged[-1].index == delta.index:
            last = merged.pop()
            delta = CallDelta(delta.index, last.arguments + delta.arguments, last.id, last.name)
        merged.append(delta)
    return merged

"""From token ids to text, a few tokens at a time, with stop strings cut where they complete."""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass
from typing import Protocol

from server.core.sampling_params import SamplingParams

_REPLACEMENT = "\ufffd"
# Tokens that may wait for the rest of a character; beyond it the replacement is the text. More than
# one step brings, so that a character cut by the end of a step always gets its rest.
_LONGEST_OPEN = 64
_CONTEXT = 6  # prompt tokens that give the first generated token its leading space


class Decoder(Protocol):
    """The part of `tokenizers.Tokenizer` that is needed here."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True, slots=True)
class StopMatch:
    """The stop string that completed first.

    Attributes:
        num_tokens: tokens of the push up to and including the one that completed it; 0 where
            the end of the text did.
        stop: the string.
    """

    num_tokens: int
    stop: str


class TextStream:
    """Text of one sequence.

    Characters are held back while they may belong to an unfinished UTF-8 character or to a stop
    string that has begun. `prompt` only gives context and is never part of the text.
    """

    def __init__(self, decoder: Decoder, prompt: Row[int], params: SamplingParams) -> None:
        self._decoder = decoder
        self._params = params
        self._ids = list(prompt[-_CONTEXT:])
        self._prefix = 0  # ids before this only gave context to what was decoded last
        self._read = len(self._ids)  # ids before this are in the text already
        self._held = ""  # decoded, but a stop string may have begun in it
        self._num_pushed = 0
        # With include_stop the stop string is part of the text: nothing to hold back.
        longest = max((len(stop) for stop in params.stop), default=1)
        self._hold = 0 if params.include_stop else longest - 1
        self._context = longest - 1  # characters a stop string may share with earlier text
        self._tail = ""  # released characters that a stop string may have begun in

    def push(self, token_ids: Row[int]) -> tuple[str, StopMatch | None]:
        """Add tokens; returns released text, and the first stop string if one completed.

        Nothing may be pushed after a match.
        """
        if not self._params.stop:
            self._ids += token_ids
            return self._decode_new(), None
        released = ""
        for count, token_id in enumerate(token_ids, start=1):
            self._ids.append(token_id)
            self._num_pushed += 1
            text, stop = self._scan(self._decode_new())
            released += text
            if stop is not None:
                return released, StopMatch(count, stop)
        return released, None

    def flush(self) -> tuple[str, StopMatch | None]:
        """The rest of the text, and the stop string that it completes; called once, at the end.

        An unfinished character becomes U+FFFD.
        """
        rest = self._decode_new(is_last=True)
        if not self._params.stop:
            return rest, None
        text, stop = self._scan(rest)
        if stop is not None:
            return text, StopMatch(0, stop)
        return text + self._held, None

    def _scan(self, new: str) -> tuple[str, str | None]:
        """Look for stop strings that end within `new`; returns released text and the match."""
        if self._num_pushed <= self._params.min_tokens:
            return new, None
        seen = self._tail + self._held
        text = seen + new
        found = _first_completed(text, self._params.stop, len(seen))
        if found is not None:
            start, end = found
            cut = end if self._params.include_stop else start
            self._held = ""
            return text[len(self._tail) : cut], text[start:end]
        pending = self._held + new
        keep = min(self._hold, len(pending))
        self._held = pending[len(pending) - keep :]
        released = pending[: len(pending) - keep]
        if self._params.include_stop:
            self._tail = text[len(text) - min(self._context, len(text)) :]
        return released, None

    def _decode_new(self, *, is_last: bool = False) -> str:
        skip = self._params.skip_special_tokens
        before = self._decoder.decode(self._ids[self._prefix : self._read], skip)
        after = self._decoder.decode(self._ids[self._prefix :], skip)
        # An unfinished character, or nothing to see yet: what comes next needs these as context.
        is_open = after.endswith(_REPLACEMENT) or len(after) <= len(before)
        if is_open and not is_last and len(self._ids) - self._read <= _LONGEST_OPEN:
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]


def _first_completed(text: str, stops: Row[str], start: int) -> tuple[int, int] | None:
    """(start, end) of the stop string that ends first after `start`; the longest among equals."""
    found = []
    for stop in stops:
        at = text.find(stop, max(0, start - len(stop) + 1))
        if at >= 0:
            found.append((at + len(stop), at))
    if not found:
        return None
    end, begin = min(found)
    return begin, end

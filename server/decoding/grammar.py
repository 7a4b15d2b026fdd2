"""Grammars: JSON schemas, regular expressions, choices and Lark, as masks over the vocabulary.

A text that follows a grammar is decoded as any other: the mask of a position is a warp, a function
of the tokens before it, pending ones included. So proposals are masked like their targets, and
what is rejected is rolled back here too.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence as Row
from contextlib import suppress
from itertools import takewhile
from threading import Lock
from typing import Literal, Protocol

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.decoding.json_schema import relaxed

Kind = Literal["json", "regex", "choice", "lark"]

# Masks of so many positions are kept: more than can be pending.
_KEPT_MASKS = 64
_KEPT_GRAMMARS = 32
# Of a Lark grammar. What is wrong with a rule is told once more by each rule that leads there, at
# greater length each time: thousands would take minutes.
_MOST_LINES = 1000

# Bounds of the work and memory of one position, and of reading a grammar. A mask takes time by the
# length of the literals it is in the midst of, which the first bounds.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=60_000,
    step_lexer_fuel=20_000,
    step_max_items=20_000,
    max_items_in_row=20_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class Serialisable(Protocol):
    """The part of `tokenizers.Tokenizer` that grammars need."""

    def to_str(self) -> str: ...

    def get_vocab_size(self) -> int: ...


class GrammarError(ValueError):
    """No grammar, or one beyond the limits; `str()` says why in one line."""


class GrammarMatcher:
    """The grammar of one sequence; see `core.matcher.Matcher`."""

    def __init__(
        self,
        template: LLMatcher,
        tokenizer: LLTokenizer,
        eos_token_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        """`template`, of `tokenizer`, has consumed nothing, and never will: it is copied."""
        self._template = template
        self._tokenizer = tokenizer
        self._matcher = template.deep_copy()
        self._eos = eos_token_ids
        self._num_bytes = -(-vocab_size // 8)
        self._followed: list[int] = []
        self._num_consumed = 0  # of these, by the matcher: nothing after the end
        self._end: int | None = None
        self._masks: dict[int, bytes] = {}  # by number of tokens before
        self._final = _bits(eos_token_ids, self._num_bytes)
        self.error: str | None = None
        self._failed_at = 0  # number of tokens that led to the error

    def mask(self, generated: Row[int]) -> bytes:
        """Once the text is complete only its end may follow; after an error nothing may."""
        count = len(generated)
        if count not in self._masks or not self._has_followed(generated):
            self._follow(generated)
            self._masks.pop(count - _KEPT_MASKS, None)
            self._masks[count] = self._compute()
        return self._masks[count]

    def end(self, generated: Row[int]) -> int | None:
        """See `Matcher`."""
        self._follow(generated)
        return self._end

    def _has_followed(self, generated: Row[int]) -> bool:
        return self._followed[: len(generated)] == list(generated)

    def _follow(self, generated: Row[int]) -> None:
        """Move to the end of `generated`, back over what it does not share with the last one."""
        if self._has_followed(generated):
            common = len(generated)
        else:
            pairs = zip(self._followed, generated, strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._roll_back(common)
        for token_id in generated[common:]:
            self._consume(token_id)

    def _roll_back(self, count: int) -> None:
        if self.error is not None and count < self._failed_at:
            self._start_again(self._followed[:count])
        elif (surplus := self._num_consumed - count) > 0:
            self._matcher.rollback(surplus)
            self._num_consumed = count
        if self._end is not None and self._end > count:
            self._end = None
        del self._followed[count:]
        # The mask after the common tokens still holds; those of what follows do not.
        self._masks = {n: mask for n, mask in self._masks.items() if n <= count}

    def _start_again(self, generated: list[int]) -> None:
        """A matcher that has failed stays so, even if the tokens that led there are taken back."""
        self._matcher, self.error = self._template.deep_copy(), None
        self._followed, self._num_consumed, self._end = [], 0, None
        for token_id in generated:
            self._consume(token_id)

    def _consume(self, token_id: int) -> None:
        self._followed.append(token_id)
        if self._end is not None or self.error is not None:
            return
        if token_id in self._eos:
            self._end = len(self._followed)
            return
        if not self._matcher.consume_token(token_id):
            self._fail()
            return
        self._num_consumed += 1
        if self._matcher.is_stopped():
            self._end = len(self._followed)

    def _compute(self) -> bytes:
        if self.error is None and self._end is not None:
            return self._final
        mask = b"" if self.error else self._spelt(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            self._fail()
        return bytes(self._num_bytes) if self.error else mask[: self._num_bytes]

    def _spelt(self, mask: bytes) -> bytes:
        """Where only one text may follow and special tokens read like it, its usual tokens.

        llguidance tokenises such a text with them, allows the first, and then does not take it: to
        a grammar a special token is none of the characters that it is called by.
        """
        bits = int.from_bytes(mask, "little")
        if bits.bit_count() != 1:
            return mask
        token_id = bits.bit_length() - 1
        if not self._tokenizer.is_special_token(token_id) or self._matcher.validate_tokens(
            [token_id]
        ):
            return mask
        text = self._matcher.compute_ff_bytes().decode(errors="ignore")
        first = self._tokenizer.greedy_tokenize(text)[:1]
        return _bits(frozenset(first), len(mask))

    def _fail(self) -> None:
        self._failed_at = len(self._followed)
        self.error = f"the grammar cannot be followed: {_one_line(self._matcher.get_error())}"


class Grammars:
    """Compiles grammars for one vocabulary. Safe to use from many threads."""

    def __init__(
        self,
        make_tokenizer: Callable[[list[int]], LLTokenizer],
        eos_token_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        """`make_tokenizer` is called once, with the sorted end-of-text tokens.

        It takes a second or so, through which no other thread runs.
        """
        self._make_tokenizer = make_tokenizer
        self._eos = eos_token_ids
        self._vocab_size = vocab_size
        self._lock = Lock()
        self._tokenizer: LLTokenizer | None = None
        # By kind and source, latest last; of those that were refused, why.
        self._known: OrderedDict[tuple[Kind, str], LLMatcher | str] = OrderedDict()

    @classmethod
    def of(
        cls, tokenizer: Serialisable, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> Grammars:
        """For the first `vocab_size` ids of `tokenizer`, which are those that models score."""

        def make_tokenizer(ends: list[int]) -> LLTokenizer:
            # Ids that the models do not score are cut off; those that only they know are
            # impossible.
            size = max(vocab_size, tokenizer.get_vocab_size())
            return LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=ends)

        return cls(make_tokenizer, eos_token_ids, vocab_size)

    def prepare(self) -> None:
        """Make the tokenizer now, so that the first request with a grammar stalls no others."""
        with suppress(GrammarError):  # each request will be told
            self._get_tokenizer()

    def known_matchers(self, kind: Kind, source: str, count: int) -> list[GrammarMatcher] | None:
        """As `matchers`, quickly; None where the grammar was not read of late."""
        template = self._recall(kind, source)
        return None if template is None else self._copies(template, count)

    def matchers(self, kind: Kind, source: str, count: int) -> list[GrammarMatcher]:
        """`count` matchers of one grammar; slow, and to be called off the event loop.

        Reading one that is not known takes stack by its length: chains of references are followed
        by recursion.

        Args:
            kind: json is a schema, choice a JSON list of texts, lark llguidance's dialect of it.
            source: the grammar.
            count: at least 1.

        Raises:
            GrammarError: it is none, or takes more than the limits allow.
        """
        return self._copies(self._recall(kind, source) or self._read(kind, source), count)

    def _copies(self, template: LLMatcher, count: int) -> list[GrammarMatcher]:
        tokenizer = self._get_tokenizer()
        return [
            GrammarMatcher(template, tokenizer, self._eos, self._vocab_size) for _ in range(count)
        ]

    def _recall(self, kind: Kind, source: str) -> LLMatcher | None:
        with self._lock:
            found = self._known.get((kind, source))
            if found is not None:
                self._known.move_to_end((kind, source))
        if isinstance(found, str):
            raise GrammarError(found)
        return found

    def _read(self, kind: Kind, source: str) -> LLMatcher:
        try:
            template = self._compile(kind, source)
        except GrammarError as error:
            # Refusing one may take as long as reading it.
            self._remember(kind, source, str(error))
            raise
        self._remember(kind, source, template)
        return template

    def _remember(self, kind: Kind, source: str, found: LLMatcher | str) -> None:
        with self._lock:
            self._known[kind, source] = found
            while len(self._known) > _KEPT_GRAMMARS:
                self._known.popitem(last=False)

    def _compile(self, kind: Kind, source: str) -> LLMatcher:
        matcher = LLMatcher(
            self._get_tokenizer(), _grammar(kind, source), log_level=0, limits=_LIMITS
        )
        if not matcher.is_error():
            # The first mask builds most of what later ones need, and meets most of the limits.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(_one_line(matcher.get_error()))
        return matcher

    def _get_tokenizer(self) -> LLTokenizer:
        if not self._eos:
            raise GrammarError("the served models have no end-of-text token")
        with self._lock:
            if self._tokenizer is None:
                try:
                    self._tokenizer = self._make_tokenizer(sorted(self._eos))
                except ValueError as error:
                    raise GrammarError(f"the tokenizer has no grammars: {error}") from error
            return self._tokenizer


def _grammar(kind: Kind, source: str) -> str:
    match kind:
        case "json":
            return LLMatcher.grammar_from_json_schema(relaxed(source))
        case "regex":
            return LLMatcher.grammar_from_regex(source)
        case "choice":
            texts = [json.dumps(text) for text in json.loads(source)]
            return LLMatcher.grammar_from_lark("start: " + " | ".join(texts))
        case "lark":
            if (num_lines := len(source.splitlines())) > _MOST_LINES:
                raise GrammarError(f"{num_lines} lines are more than {_MOST_LINES}")
            return LLMatcher.grammar_from_lark(source)


def _bits(token_ids: frozenset[int], num_bytes: int) -> bytes:
    mask = bytearray(num_bytes)
    for token_id in token_ids:
        mask[token_id // 8] |= 1 << token_id % 8
    return bytes(mask)


def _one_line(text: str) -> str:
    return " ".join(text.removesuffix("<non-verbose/>").split())[:500]

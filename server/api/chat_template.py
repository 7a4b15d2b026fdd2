"""Conversations to text, by the template that came with the expert's tokenizer.

Templates are programs of the model's author, run in transformers' sandbox (no attribute of a
value can be reached or changed). A request can neither bring its own nor hand one anything but
text and plain values, under names that the template itself mentions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from server.api.chat_protocol import Scalar


@dataclass(frozen=True, slots=True)
class Turns:
    """What a template renders.

    Attributes:
        messages: role and content of each, and what else it says.
        opens_reply: end with the head of the reply's turn.
        continues_last: leave the last message's turn open.
        tools: that the reply may call; None for none.
        variables: others that the template reads.
    """

    messages: list[dict[str, Any]]
    opens_reply: bool
    continues_last: bool
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Scalar]


class ChatTemplate(Protocol):
    """Renders conversations; safe to use from many threads."""

    @property
    def source(self) -> str: ...

    def render(self, turns: Turns) -> str: ...


class TemplatedTokenizer(Protocol):
    """The part of transformers' tokenizers that is needed here."""

    def get_chat_template(self) -> str: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


class TokenizerTemplate:
    """The template of a transformers tokenizer."""

    def __init__(self, tokenizer: TemplatedTokenizer) -> None:
        """Raises ValueError where it has none, or several without a default."""
        self.source = tokenizer.get_chat_template()
        self._tokenizer = tokenizer

    def render(self, turns: Turns) -> str:
        text = self._tokenizer.apply_chat_template(
            turns.messages,
            tools=turns.tools,
            chat_template=self.source,
            tokenize=False,
            add_generation_prompt=turns.opens_reply,
            continue_final_message=turns.continues_last,
            **turns.variables,
        )
        assert isinstance(text, str)
        return text

"""Kinds of sequences, whose proposals fare differently."""

from __future__ import annotations

from typing import Literal, NamedTuple

from server.core.sequence import Sequence


class Kind(NamedTuple):
    """What is learnt of a sequence says much of others of its kind, and little of the rest.

    Attributes:
        drawing: how tokens are drawn: what is proposed is accepted by another rule for each.
        has_grammar: its text follows a grammar, which may leave no choice about tokens.
    """

    drawing: Literal["greedy", "seeded", "free"]
    has_grammar: bool


def kind_of(sequence: Sequence) -> Kind:
    """The kind of `sequence`."""
    has_grammar = sequence.matcher is not None
    if sequence.params.is_greedy:
        return Kind("greedy", has_grammar)
    return Kind("seeded" if sequence.params.is_seeded else "free", has_grammar)

"""Grammars over the tiny models' vocabulary; of their own, as not all machines have llguidance."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from server.decoding.grammar import Grammars
from tests.support.tiny_models import TURN_END


def make_grammars(tokenizer: PreTrainedTokenizerFast) -> Grammars:
    """Over the vocabulary of `tokenizer`; TURN_END ends a text."""
    ends = frozenset({tokenizer.convert_tokens_to_ids(TURN_END)})
    return Grammars.of(tokenizer.backend_tokenizer, len(tokenizer), ends)

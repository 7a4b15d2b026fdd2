"""Grammars over the tiny models' vocabulary; of their own, as not all machines have llguidance."""

from __future__ import annotations

from llguidance import LLTokenizer
from transformers import PreTrainedTokenizerFast

from server.decoding.grammar import Grammars
from tests.support.tiny_models import TURN_END


def make_grammars(tokenizer: PreTrainedTokenizerFast) -> Grammars:
    """Over the vocabulary of `tokenizer`; TURN_END ends a text."""
    serialised, size = tokenizer.backend_tokenizer.to_str(), len(tokenizer)
    return Grammars(
        lambda ends: LLTokenizer(serialised, n_vocab=size, eos_token=ends),
        frozenset({tokenizer.convert_tokens_to_ids(TURN_END)}),
        size,
    )

"""What a request changes of single tokens' scores at a position: penalties, biases, bans.

Plain numbers, for whoever applies them: `decoding.warp` and the kernel that decides tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Row

import numpy as np
from numpy.typing import NDArray

from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence

Ids = NDArray[np.int64]
Reals = NDArray[np.float32]
# Tokens, [n], and of each what its score is divided by (multiplied, if it is below 0) and what is
# added then, [n, 2].
Changes = tuple[Ids, Reals]

NONE: Changes = np.empty(0, np.int64), np.empty((0, 2), np.float32)


def penalties(sequence: Sequence, position: int) -> Changes:
    """Of the tokens before `position`, each of them once; none of them may be unread."""
    params = sequence.params
    if not params.has_penalties:
        return NONE
    tokens, counts = sequence.counts_before(position)
    if params.repetition_penalty == 1:
        generated = counts > 0
        tokens, counts = tokens[generated], counts[generated]
    changes = np.empty((len(tokens), 2), np.float32)
    changes[:, 0] = params.repetition_penalty
    times = counts.astype(np.float32)
    changes[:, 1] = -(np.float32(params.frequency_penalty) * times)
    changes[:, 1] -= np.where(counts > 0, np.float32(params.presence_penalty), 0)
    return tokens, changes


def added(biases: Iterable[tuple[int, float]]) -> Changes:
    """What is added to scores of tokens; not to be written to."""
    pairs = list(biases)
    if not pairs:
        return NONE
    tokens, numbers = zip(*pairs, strict=True)
    changes = np.ones((len(tokens), 2), np.float32)
    changes[:, 1] = numbers
    return np.array(tokens, np.int64), changes


def forbidden(token_ids: Iterable[int]) -> Changes:
    """What leaves tokens no probability; not to be written to."""
    return added((token_id, -np.inf) for token_id in token_ids)


def joined(parts: Iterable[Changes]) -> Changes:
    """One after the other."""
    parts = [part for part in parts if len(part[0])]
    if len(parts) < 2:
        return parts[0] if parts else NONE
    tokens, changes = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate(changes)


def bad_tokens(sequence: Sequence, position: int) -> list[int]:
    """Those that would complete a bad word there."""
    return [w[-1] for w in sequence.params.bad_words if _completes(w, sequence, position)]


def is_early(sequence: Sequence, position: int) -> bool:
    """Must the text be longer before a token there may end it?"""
    return position < sequence.num_prompt + sequence.params.min_tokens


def ending_tokens(params: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Those that end a text."""
    return params.stop_token_ids if params.ignore_eos else params.stop_token_ids | eos_token_ids


def _completes(word: Row[int], sequence: Sequence, position: int) -> bool:
    """Whether the generated tokens before `position` end with all of `word` but its last."""
    start = position - len(word) + 1
    return start >= sequence.num_prompt and sequence.token_ids[start:position] == list(word[:-1])

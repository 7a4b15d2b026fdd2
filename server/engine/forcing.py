"""Tokens that a form leaves no choice about.

Where a grammar allows one token only, its probability is 1 under every combination, and no model
needs to say so. It is verified as it is, and the models read it together with what follows:
jump-forward decoding. Seeded and greedy texts are the same with it and without, for randomness is
by position.
"""

from __future__ import annotations

from collections.abc import Iterable

from server.core.sequence import Sequence


def force(sequences: Iterable[Sequence], most: int, counts: dict[Sequence, int]) -> None:
    """Verify up to `most` forced tokens of each sequence that has nothing pending; counts them."""
    for sequence in sequences:
        if not _may_force(sequence):
            continue
        for _ in range(most):
            token_id = _forced_token(sequence)
            if token_id is None:
                break
            sequence.force(token_id)
            counts[sequence] = counts.get(sequence, 0) + 1


def _may_force(sequence: Sequence) -> bool:
    """Whether one token in its mask is the only one that is possible, and needs no scores.

    Before `min_tokens`, and beside `bad_words`, it may be banned; and log-probabilities are those
    of the free text. A mixture's coins go on with each token that is drawn.
    """
    params = sequence.params
    return (
        sequence.matcher is not None
        and sequence.num_pending == 0
        and params.logprobs is None
        and not params.bad_words
        and sequence.num_generated >= max(1, params.min_tokens)
        and sequence.schedule.strategy != "mixture"
    )


def _forced_token(sequence: Sequence) -> int | None:
    """None also where the text is complete: what follows is its end, which is not written."""
    assert sequence.matcher is not None
    generated = sequence.token_ids[sequence.num_prompt :]
    if sequence.is_full or sequence.matcher.end(generated) is not None:
        return None
    mask = sequence.mask(len(sequence))
    assert mask is not None
    bits = int.from_bytes(mask.tobytes(), "little")
    return bits.bit_length() - 1 if bits.bit_count() == 1 else None

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
        if sequence.matcher is None or sequence.num_pending or not sequence.num_generated:
            continue
        for _ in range(most):
            token_id = forced_token(sequence)
            if token_id is None:
                break
            sequence.force(token_id)
            counts[sequence] = counts.get(sequence, 0) + 1


def forced_token(sequence: Sequence) -> int | None:
    """The next token where nothing else may follow, and what is pending is read.

    None also where the text is complete: what follows is its end, which is not written.
    """
    if sequence.matcher is None or sequence.is_full or not _is_sure(sequence):
        return None
    generated = sequence.token_ids[sequence.num_prompt :]
    if sequence.matcher.end(generated) is not None:
        return None
    mask = sequence.mask(len(sequence))
    assert mask is not None
    bits = int.from_bytes(mask.tobytes(), "little")
    return bits.bit_length() - 1 if bits.bit_count() == 1 else None


def _is_sure(sequence: Sequence) -> bool:
    """Whether the only token in the next mask needs no scores.

    Before `min_tokens`, and beside `bad_words`, it may be banned; and log-probabilities are those
    of the free text. A mixture's coins go on with each token that is drawn.
    """
    params = sequence.params
    return (
        params.logprobs is None
        and not params.bad_words
        and len(sequence) - sequence.num_prompt >= params.min_tokens
        and sequence.schedule.strategy != "mixture"
    )

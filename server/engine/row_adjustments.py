"""What requests change of single scores, as the kernel that decides tokens takes it.

Penalties, biases, lists of tokens and words, `min_tokens` and grammars: those of `decoding.warp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Row
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.decoding.warp import Place, bad_tokens, early_ends

Ids = NDArray[np.int64]
Reals = NDArray[np.float32]
Bits = NDArray[np.uint8]
_Changes = tuple[Ids, Reals]  # tokens, [n], and what is changed of their scores, [n, 2]

_NONE: _Changes = np.empty(0, np.int64), np.empty((0, 2), np.float32)


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Of R rows; see `simd.decisions.decider` and `simd.adjustment`.

    Attributes:
        starts: [R + 1], of the rows' changes.
        changed: [N], tokens.
        changes: [N, 2].
        masks: [R], addresses of rows of `bits`, or 0.
        bits: [M, whole blocks of the vocabulary, by eight].
    """

    starts: Ids
    changed: Ids
    changes: Reals
    masks: Ids
    bits: Bits

    def allows(self, row: int, ids: Ids) -> NDArray[np.bool_] | None:
        """Which tokens of `ids` a row leaves possible; None: all of them."""
        changes = slice(self.starts[row], self.starts[row + 1])
        banned = self.changed[changes][self.changes[changes, 1] == -np.inf]
        mask = self.masks[row]
        if not mask and not len(banned):
            return None
        allowed = ~np.isin(ids, banned)
        if mask:
            number = (mask - self.bits.ctypes.data) // self.bits.shape[1]
            allowed &= np.unpackbits(self.bits[number], bitorder="little")[ids].astype(bool)
        return allowed


class Adjuster:
    """Makes adjustments for one vocabulary."""

    def __init__(self, eos_token_ids: frozenset[int], num_bits: int) -> None:
        """`num_bits` of a mask: the vocabulary, up to whole blocks."""
        self._eos = eos_token_ids
        self._num_bytes = num_bits // 8

    def takes(self, sequence: Sequence) -> bool:
        """Can it make all that `sequence` asks for?

        Where a grammar leaves nothing but an end of text that comes too early, that end is allowed,
        and whether it is so depends on scores.
        """
        return sequence.matcher is None or not sequence.params.min_tokens

    def adjustments(self, places: Row[Place], inverse_temperatures: Reals) -> Adjustments | None:
        """Of places, whose scores are scaled by [R]; None where nothing is changed."""
        if not any(s.params.adjusts_scores or s.matcher is not None for s, _ in places):
            return None
        rows = [_joined(self._changes(*place)) for place in places]
        counts = [len(tokens) for tokens, _ in rows]
        changed, changes = _joined(rows)
        changes = changes.copy()
        changes[:, 1] *= np.repeat(inverse_temperatures, counts)
        masks, bits = self._masks(places)
        return Adjustments(
            starts=np.fromiter(accumulate(counts, initial=0), np.int64, len(counts) + 1),
            changed=changed,
            changes=changes,
            masks=masks,
            bits=bits,
        )

    def _changes(self, sequence: Sequence, position: int) -> Iterable[_Changes]:
        """In the order in which they are made."""
        params = sequence.params
        if params.has_penalties:
            yield _penalties(params, *sequence.counts_before(position))
        if params.logit_bias:
            yield _biases(params.logit_bias)
        if banned := bad_tokens(sequence, position) + early_ends(sequence, position, self._eos):
            yield _biases(tuple((token_id, -np.inf) for token_id in banned))

    def _masks(self, places: Row[Place]) -> tuple[Ids, Bits]:
        """Addresses [R] of masks, or 0, and these."""
        rows: list[Bits] = []
        numbers = np.full(len(places), -1)
        for row, (sequence, position) in enumerate(places):
            mask = self._mask(sequence, position)
            if mask is not None:
                numbers[row] = len(rows)
                rows.append(mask)
        bits = np.stack(rows) if rows else np.empty((0, self._num_bytes), np.uint8)
        return np.where(numbers < 0, 0, bits.ctypes.data + numbers * self._num_bytes), bits

    def _mask(self, sequence: Sequence, position: int) -> Bits | None:
        """[num_bytes] of what is allowed at a place; None: everything."""
        mask = None
        if (allowed := sequence.params.allowed_token_ids) is not None:
            mask = _bits(allowed, self._num_bytes)
        if sequence.matcher is not None:
            generated = sequence.token_ids[sequence.num_prompt : position]
            given = np.frombuffer(sequence.matcher.mask(generated), np.uint8)
            followed = np.pad(given, (0, self._num_bytes - len(given)))
            mask = followed if mask is None else followed & mask
        return mask


def _penalties(params: SamplingParams, tokens: Ids, counts: Ids) -> _Changes:
    """Of tokens that were seen, and generated so often."""
    if params.repetition_penalty == 1:
        generated = counts > 0
        tokens, counts = tokens[generated], counts[generated]
    changes = np.empty((len(tokens), 2), np.float32)
    changes[:, 0] = params.repetition_penalty
    times = counts.astype(np.float32)
    changes[:, 1] = -(np.float32(params.frequency_penalty) * times)
    changes[:, 1] -= np.where(counts > 0, np.float32(params.presence_penalty), 0)
    return tokens, changes


@lru_cache(maxsize=256)
def _biases(biases: tuple[tuple[int, float], ...]) -> _Changes:
    """What is added to scores of tokens; not to be written to."""
    tokens, added = zip(*biases, strict=True)
    changes = np.ones((len(tokens), 2), np.float32)
    changes[:, 1] = added
    return np.array(tokens, np.int64), changes


@lru_cache(maxsize=64)
def _bits(token_ids: tuple[int, ...], num_bytes: int) -> Bits:
    """A mask of these tokens; not to be written to."""
    mask = np.zeros(num_bytes * 8, np.uint8)
    mask[list(token_ids)] = 1
    return np.packbits(mask, bitorder="little")


def _joined(parts: Iterable[_Changes]) -> _Changes:
    """One after the other."""
    parts = list(parts)
    if len(parts) < 2:
        return parts[0] if parts else _NONE
    tokens, changes = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate(changes)

"""What a list and a grammar allow together, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence as Row

import numpy as np
import pytest

from server.core.combination import Combination
from server.core.proposal import Proposal
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.core.token_mask import Bits, are_in, both, packed, stacked

DECODING = DecodingParams("cos", Combination.only(1, 0), (1,))


class Rising:
    """Allows tokens below 20 that are larger than the last one."""

    error: str | None = None

    def mask(self, generated: Row[int]) -> bytes:
        return packed(range(max(generated, default=0) + 1, 20)).tobytes()

    def end(self, generated: Row[int]) -> int | None:
        return None


def tokens_of(mask: Bits) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()


@pytest.mark.parametrize("token_ids", [[0], [7], [8], [3, 1, 2], [5, 5, 300], [*range(64)]])
def test_packed(token_ids: list[int]) -> None:
    mask = packed(token_ids)
    assert tokens_of(mask) == sorted({*token_ids})
    asked = np.arange(len(mask) * 8)
    assert np.flatnonzero(are_in(asked, mask)).tolist() == sorted({*token_ids})


def test_masks_of_different_lengths() -> None:
    assert tokens_of(both(packed([1, 9, 40]), packed([9, 1]))) == [1, 9]
    rows = stacked([packed([2]), packed([17])], 4)
    assert rows.shape == (2, 4)
    assert [tokens_of(row) for row in rows] == [[2], [17]]
    assert stacked([], 4).shape == (0, 4)


@pytest.mark.parametrize(
    ("listed", "matcher", "expected"),
    [
        (None, None, None),
        ((30, 4, 16), None, [4, 16, 30]),
        (None, Rising(), [15, 16, 17, 18, 19]),
        ((30, 4, 16), Rising(), [16]),
        ((4,), Rising(), []),
    ],
)
def test_what_a_sequence_allows(
    listed: tuple[int, ...] | None, matcher: Rising | None, expected: list[int] | None
) -> None:
    params = SamplingParams(max_tokens=9, allowed_token_ids=listed)
    sequence = Sequence.start("s", [25], params, DECODING, matcher=matcher)
    for token_id in (3, 14, 18):
        sequence.propose(token_id, Proposal(0))
    for _ in range(2):
        mask = sequence.mask(3)
        assert mask is expected if mask is None else tokens_of(mask) == expected

"""Names of full pages: what a page holds follows from the tokens up to its end, and from a salt."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b


class PrefixKeys:
    """Keys of one sequence's pages, each a digest of its tokens and of the key before it.

    256 bits of blake2b: two prefixes with one key are not to be found, so a key stands for its
    tokens. Sequences with different salts never share a key. Keys are computed once; only verified
    tokens, which never change, may be asked for.
    """

    def __init__(self, page_size: int, salt: str = "") -> None:
        self._page_size = page_size
        self._chain = [blake2b(salt.encode(), digest_size=32, person=b"cos-salt").digest()]

    def key(self, token_ids: Sequence[int], index: int) -> bytes:
        """Of page `index`, all of whose tokens are verified."""
        chain, size = self._chain, self._page_size
        while len(chain) < index + 2:
            start = (len(chain) - 1) * size
            tokens = array("q", token_ids[start : start + size])
            assert len(tokens) == size, "only full pages have keys"
            chain.append(blake2b(chain[-1] + tokens.tobytes(), digest_size=32).digest())
        return chain[index + 1]

"""The vocabulary all members share: same tokens, same ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from server.errors import ConfigError


def shared_vocab_size(names: Sequence[str], vocabularies: Sequence[Mapping[str, int]]) -> int:
    """Number of ids of the vocabulary that all members agree on.

    Args:
        names: of the members, for messages.
        vocabularies: token -> id of each member, added tokens included.

    Raises:
        ConfigError: two members disagree; names the first differing token and both ids.
    """
    first = vocabularies[0]
    for name, vocabulary in zip(names[1:], vocabularies[1:], strict=True):
        if vocabulary != first:
            problem = _first_difference(names[0], first, name, vocabulary)
            raise ConfigError(f"models {names[0]} and {name} do not share a vocabulary: {problem}")
    return max(first.values()) + 1


def _first_difference(
    left_name: str, left: Mapping[str, int], right_name: str, right: Mapping[str, int]
) -> str:
    """Describe the differing token with the smallest id in either."""
    differing = [token for token in {*left, *right} if left.get(token) != right.get(token)]

    def smallest_id(token: str) -> tuple[int, str]:
        return min(left[token] if token in left else right[token], right.get(token, 1 << 62)), token

    token = min(differing, key=smallest_id)
    return (
        f"token {token!r} is {_id(left, token)} in {left_name} and {_id(right, token)} in "
        f"{right_name} ({len(differing)} tokens differ; {len(left)} and {len(right)} in all)"
    )


def _id(vocabulary: Mapping[str, int], token: str) -> str:
    return str(vocabulary[token]) if token in vocabulary else "missing"


def end_of_text_ids(vocab_size: int, *sources: int | Sequence[int] | None) -> frozenset[int]:
    """Union of eos ids (one, several or none from each source) that lie in the vocabulary."""
    ids: set[int] = set()
    for source in sources:
        ids.update([source] if isinstance(source, int) else source or ())
    return frozenset(token for token in ids if 0 <= token < vocab_size)

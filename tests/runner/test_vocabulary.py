import pytest

from server.errors import ConfigError
from server.runner.vocabulary import end_of_text_ids, shared_vocab_size


def test_equal_maps_share():
    assert shared_vocab_size(["a", "b"], [{"x": 0, "y": 3}, {"y": 3, "x": 0}]) == 4


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ({"x": 0, "y": 1, "z": 2}, {"x": 0, "z": 1, "y": 2}, "'y' is 1 in a and 2 in b"),
        ({"x": 0, "y": 1}, {"x": 0}, "'y' is 1 in a and missing in b"),
        ({"x": 0}, {"x": 0, "y": 1}, "'y' is missing in a and 1 in b"),
    ],
)
def test_first_differing_token_is_named(left, right, expected):
    with pytest.raises(ConfigError, match="a and b do not share a vocabulary") as caught:
        shared_vocab_size(["a", "b"], [left, right])
    assert expected in str(caught.value)


def test_third_member_is_compared_too():
    with pytest.raises(ConfigError, match="a and c"):
        shared_vocab_size(["a", "b", "c"], [{"x": 0}, {"x": 0}, {"x": 1}])


def test_end_of_text_ids():
    assert end_of_text_ids(10, [3, 12], 4, None, 3) == {3, 4}
    assert end_of_text_ids(10, [-1, 0], [9, 10]) == {0, 9}
    assert end_of_text_ids(10, None, None) == frozenset()

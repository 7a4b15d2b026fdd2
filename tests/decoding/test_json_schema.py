"""What is taken out of schemas asks nothing, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.decoding.grammar import GrammarError, Grammars
from server.decoding.json_schema import FORMATS, relaxed
from tests.support.tiny_grammars import make_grammars
from tests.support.tiny_models import make_tokenizer


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return make_grammars(make_tokenizer())


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_formats_that_are_kept_are_known(grammars: Grammars, name: str) -> None:
    source = json.dumps({"type": "string", "format": name})
    assert relaxed(source) == source
    assert grammars.matchers("json", source, 1)


@pytest.mark.parametrize("name", ["password", "binary", "path", "uri-reference", "regex"])
def test_formats_that_nothing_enforces_are_no_reason_to_refuse(
    grammars: Grammars, name: str
) -> None:
    """As pydantic writes secrets, bytes and paths."""
    text = {"type": "string", "format": name}
    assert grammars.matchers("json", json.dumps({"type": "object", "properties": {"a": text}}), 1)


def test_what_asks_for_something_unknown_is_refused(grammars: Grammars) -> None:
    with pytest.raises(GrammarError, match="uniqueItems"):
        grammars.matchers("json", json.dumps({"type": "array", "uniqueItems": True}), 1)


IDLE: dict[str, Any] = {"type": "string", "format": "password", "uniqueItems": False}
LEFT = {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (IDLE, LEFT),
        ({"items": IDLE, "prefixItems": [IDLE]}, {"items": LEFT, "prefixItems": [LEFT]}),
        ({"items": [IDLE, {"not": IDLE}]}, {"items": [LEFT, {"not": LEFT}]}),
        ({"anyOf": [True, IDLE]}, {"anyOf": [True, LEFT]}),
        ({"$defs": {"format": IDLE}}, {"$defs": {"format": LEFT}}),
        ({"properties": {"uniqueItems": False}}, {"properties": {"uniqueItems": False}}),
        ({"properties": {"format": IDLE}}, {"properties": {"format": LEFT}}),
        ({"enum": [IDLE]}, {"enum": [IDLE]}),
        ({"const": IDLE, "default": IDLE}, {"const": IDLE, "default": IDLE}),
        ({"format": 5, "uniqueItems": 0}, {"format": 5, "uniqueItems": 0}),
        ({"properties": [IDLE]}, {"properties": [IDLE]}),
        (True, True),
    ],
)
def test_only_schemas_are_relaxed(schema: Any, expected: Any) -> None:
    """And not names of properties, or values that are given."""
    assert json.loads(relaxed(json.dumps(schema))) == expected


@pytest.mark.parametrize("source", ["{", "[" * 100_000, '{"a": "\\ud800"}', "{ }"])
def test_what_is_not_relaxed_is_left_to_the_letter(source: str) -> None:
    assert relaxed(source) == source

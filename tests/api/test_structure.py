"""Texts of a form that the request gives."""

from __future__ import annotations

import json
import re
import string
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.api.conftest import Live

FREE = {"max_tokens": 30, "seed": 4}


@pytest.mark.parametrize("cos", [{}, {"strategy": "standard"}])
@pytest.mark.parametrize("temperature", [0, 1])
def test_texts_follow_the_form(live: Live, cos: dict[str, Any], temperature: float) -> None:
    fields = {**FREE, "cos": cos, "temperature": temperature, "n": 3, "ignore_eos": True}
    forms: list[tuple[dict[str, Any], str]] = [
        ({"structured_outputs": {"regex": "([a-c]{2}1 )+end"}}, "([a-c]{2}1 )+end"),
        ({"guided_regex": "a(b|c)*d"}, "a(b|c)*d"),
        ({"structured_outputs": {"choice": ["abc", "1 2 ", "d"]}}, "abc|1 2 |d"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: "x" start "y" | "1 "'}, "x*1 y*"),
    ]
    for form, pattern in forms:
        for choice in live.complete(**fields, **form)["choices"]:
            if choice["finish_reason"] == "stop":
                assert re.fullmatch(pattern, choice["text"]), (form, choice["text"])
    [chunk_text] = {
        "".join(c["choices"][0]["text"] for c in live.stream(**{**fields, "n": 1}, **forms[3][0]))
    }
    assert chunk_text in {"yes", "no"}
    chat = live.chat(**fields, structured_outputs={"choice": ["yes", "no"]})
    assert all(choice["message"]["content"] in {"yes", "no"} for choice in chat["choices"])


@pytest.mark.parametrize("type_", ["json_object", "json_schema"])
def test_a_schema_beside_the_type_is_followed(live: Live, type_: str) -> None:
    form = {"type": type_, "schema": {"const": True}}
    assert live.complete(**FREE, response_format=form)["choices"][0]["text"] == "true"


def test_log_probabilities_are_those_of_the_free_text(live: Live) -> None:
    [choice] = live.complete(**FREE, guided_choice=["a"], logprobs=0)["choices"]
    assert choice["logprobs"]["token_logprobs"][0] < -0.5


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.json_schema",
            "type text",
        ),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema", "text"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
            "response_format.json_schema",
            "type json_object",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {}},
                    "schema": {},
                }
            },
            "response_format.schema",
            "exclude each other",
        ),
        (
            {"response_format": {"type": "json_object", "schema": {"uniqueItems": True}}},
            "response_format.schema",
            "uniqueItems",
        ),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_regex": "a" * 70000}, "guided_regex", "limit 65536"),
        ({"guided_json": "{nonsense"}, "guided_json", ""),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "exclude each other"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", ""),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        (
            {"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}},
            "structured_outputs.json",
            "uniqueItems",
        ),
    ],
)
def test_refusals(live: Live, fields: dict[str, Any], param: str, words: str) -> None:
    for response in (live.post(**fields), live.post_chat(**fields)):
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert words in response.json()["error"]["message"]


def chain(link: Callable[[int], str], end: str, most: int = 65_000) -> str:
    """As many links as fit."""
    text, number = "", 0
    while len(text) + len(link(number)) + len(end) < most:
        text += link(number)
        number += 1
    return text + end.format(number)


def name(number: int) -> str:
    letters = string.ascii_lowercase
    return letters[number // 676] + letters[number // 26 % 26] + letters[number % 26]


def rules(count: int, end: str) -> str:
    links = "".join(f"{name(n)}: {name(n + 1)}\n" for n in range(count))
    return f"start: {name(0)}\n{links}{end}"


def schemas(wrap: Callable[[str], str]) -> str:
    """Each refers to the next."""

    def link(number: int) -> str:
        return f'"{number}":{wrap(json.dumps({"$ref": f"#/$defs/{number + 1}"}))},'

    definitions = chain(link, '"{}":{{}}')
    return f'{{"$ref":"#/$defs/0","$defs":{{{definitions}}}}}'


CHAINS: list[dict[str, Any]] = [
    {"guided_grammar": rules(998, f'{name(998)}: "a"')},
    {"guided_grammar": rules(500, "")},
    {"guided_grammar": rules(7000, f'{name(7000)}: "a"')},
    *(
        {"guided_json": schemas(wrap)}
        for wrap in (
            lambda inner: f'{{"items":{inner}}}',
            lambda inner: f'{{"type":"array","items":{inner}}}',
            lambda inner: f'{{"allOf":[{inner}]}}',
            lambda inner: f'{{"anyOf":[{inner},{{"type":"null"}}]}}',
            lambda inner: f'{{"oneOf":[{inner}]}}',
            lambda inner: f'{{"prefixItems":[{inner}]}}',
            lambda inner: f'{{"properties":{{"a":{inner}}},"required":["a"]}}',
            lambda inner: f'{{"additionalProperties":{inner}}}',
        )
    ),
]


@pytest.mark.parametrize("form", CHAINS)
def test_long_chains_of_references_do_not_end_the_process(live: Live, form: dict[str, Any]) -> None:
    """Followed by recursion, they overflow the stack of a usual thread."""
    response = live.post(max_tokens=4, **form)
    assert response.status_code in (200, 400), response.text
    assert live.http.get("/health").status_code == 200


def test_reading_a_grammar_may_not_take_for_ever(
    start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, gate = start(http={"grammar_seconds": 0.05, "max_grammar_bytes": 5}), threading.Event()
    monkeypatch.setattr(live.table.service.grammars, "matchers", lambda *_: gate.wait(20))
    for regex in ("a", "b"):  # each keeps one of two threads
        slow = live.post(guided_regex=regex)
        assert slow.status_code == 400
        assert "longer than" in slow.json()["error"]["message"]
    busy = live.post(guided_regex="c")
    gate.set()
    assert (busy.status_code, busy.json()["error"]["code"]) == (503, "busy")
    assert int(busy.headers["retry-after"]) > 0
    assert "limit 5" in live.post(guided_regex="abcdef").json()["error"]["message"]


def test_a_tokenizer_without_grammars_refuses_by_name(start: Callable[..., Live]) -> None:
    live = start(has_grammars=False)
    assert live.post(max_tokens=1, response_format={"type": "text"}).status_code == 200
    error = live.post(response_format={"type": "json_object"}).json()["error"]
    assert (error["param"], error["code"]) == ("response_format", "unsupported_parameter")

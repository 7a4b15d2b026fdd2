"""Which format a template teaches, and grammars of calls over tokenizers that know its marks."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from server.api.call_format import FORMATS, CallFormat, find_format
from server.api.chat_protocol import ChatCompletionRequest
from server.api.chat_template import TokenizerTemplate
from server.api.codec import Codec
from server.api.service import Service
from server.api.structure import Structure
from server.api.tool_calls import ToolCalls, plan_calls
from server.engine.async_engine import AsyncEngine
from server.errors import UnsupportedParameter
from server.metrics import Metrics
from tests.support.api import MODEL, make_config, make_engine
from tests.support.callers import NAMED, REQUIRED, TEMPLATES
from tests.support.tiny_grammars import make_grammars
from tests.support.tiny_models import TURN_END, make_tokenizer

HERMES = FORMATS["hermes"]
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATES["hermes"], HERMES),
        (TEMPLATES["hermes"].replace('\\\\"', '"'), HERMES),
        (TEMPLATES["llama3_json"], FORMATS["llama3_json"]),
        ("{{ messages }} <tool_call>{{ name }}<arg_key>", None),
        ("<tool_call>\n<function=example>", None),
        ('[TOOL_CALLS] [{"name": x, "arguments": {}}]', None),
        ('functions: {"parameters": {}}', None),
        ("", None),
    ],
)
def test_a_template_tells_its_format(template: str, expected: CallFormat | None) -> None:
    assert find_format(template) == expected


@pytest.fixture(params=["spelt", "added", "special"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """The marks are of several tokens, of one each, or of special ones."""
    tokenizer = make_tokenizer()
    if request.param != "spelt":
        is_special = request.param == "special"
        marks = [AddedToken(m, special=is_special) for m in (HERMES.begin, HERMES.end)]
        tokenizer.add_tokens(marks, special_tokens=is_special)
    tokenizer.chat_template = TEMPLATES["hermes"]
    return tokenizer


def plan(tokenizer: PreTrainedTokenizerFast, body: dict[str, object], parser: str) -> ToolCalls:
    config = make_config(http={"tool_call_parser": parser})
    metrics = Metrics(config)
    service = Service(config, metrics)
    template = TokenizerTemplate(tokenizer)
    codec = Codec(tokenizer.backend_tokenizer, len(tokenizer), template)
    service.open(AsyncEngine(make_engine(config, metrics)[0]), codec)
    messages = [{"role": "user", "content": "?"}]
    request = ChatCompletionRequest.model_validate({"model": MODEL, "messages": messages} | body)
    return plan_calls(request, service)


def check_taken(tokenizer: PreTrainedTokenizerFast, structure: Structure, text: str) -> None:
    """`text`, as the tokenizer writes it, follows the grammar and may end there."""
    [matcher] = make_grammars(tokenizer).matchers(structure.kind, structure.source, 1)
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    ids = [*tokenizer.encode(text, add_special_tokens=False), end]
    for index, token_id in enumerate(ids):
        mask = matcher.mask(ids[:index])
        assert mask[token_id // 8] >> token_id % 8 & 1, tokenizer.decode(ids[: index + 1])
    assert matcher.error is None
    assert matcher.end(ids) == len(ids)


@pytest.mark.parametrize(
    ("parameters", "taken", "refused"),
    [
        ({}, "{}", ['"hi"', "5", "null", "[", '{"a"']),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 5}', ['"hi"', "5", "["]),
        ({"type": "object"}, '{"a":"b"}', ["5"]),
        ({"enum": [5, {"a": 1}]}, "5", ["6"]),
    ],
)
def test_arguments_are_an_object_unless_another_kind_is_asked_for(
    parameters: dict[str, object], taken: str, refused: list[str]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES["hermes"]
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    calls = plan(tokenizer, {"tools": [tool], "tool_choice": "required"}, "auto")
    assert calls.structure is not None
    head = '<tool_call>\n{"name": "f", "arguments": '
    check_taken(tokenizer, calls.structure, f"{head}{taken}}}\n</tool_call>")
    for arguments in refused:
        with pytest.raises(AssertionError):
            check_taken(tokenizer, calls.structure, f"{head}{arguments}}}\n</tool_call>")


def test_a_call_is_what_the_grammar_takes(tokenizer: PreTrainedTokenizerFast) -> None:
    calls = plan(tokenizer, REQUIRED, "auto")
    assert calls.structure is not None
    check_taken(tokenizer, calls.structure, f"{CALL}\n{CALL}")


def test_special_marks_are_kept_in_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    calls = plan(tokenizer, {"tools": REQUIRED["tools"]}, "auto")
    ids = tokenizer.encode(CALL, add_special_tokens=False)
    assert calls.shows_special == (tokenizer.decode(ids, skip_special_tokens=True) != CALL)
    assert tokenizer.decode(ids, skip_special_tokens=not calls.shows_special) == CALL


def test_the_configuration_decides_over_the_template() -> None:
    tokenizer, free = make_tokenizer(), {"tools": REQUIRED["tools"]}
    tokenizer.chat_template = "{{ tools }}{{ messages }}"
    assert plan(tokenizer, free, "auto") == ToolCalls()
    assert plan(tokenizer, free, "hermes").format == HERMES
    tokenizer.chat_template = TEMPLATES["hermes"]
    assert plan(tokenizer, free, "llama3_json").format == FORMATS["llama3_json"]
    assert plan(tokenizer, free, "off") == ToolCalls()
    assert plan(tokenizer, {**free, "tool_choice": "none"}, "auto") == ToolCalls()
    for demand in (REQUIRED, NAMED):
        with pytest.raises(UnsupportedParameter, match="tool_call_parser") as error:
            plan(tokenizer, demand, "off")
        assert error.value.param == "tool_choice"


def test_names_and_schemas_are_quoted() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES["hermes"]
    name = 'q"\\\n%json {} <[3]> é'
    tool = {"type": "function", "function": {"name": name, "parameters": {"const": "/*\n//"}}}
    calls = plan(tokenizer, {"tools": [tool], "tool_choice": "required"}, "auto")
    assert calls.structure is not None
    written = f'{{"name": {json.dumps(name)}, "arguments": "/*\\n//"}}'
    check_taken(tokenizer, calls.structure, f"<tool_call>\n{written}\n</tool_call>")

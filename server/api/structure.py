"""The form that a request asks of its text, as one grammar."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial

from anyio import to_thread

from server.api.in_time import in_time
from server.api.protocol import GenerationRequest, ResponseFormat
from server.api.service import Service
from server.decoding.grammar import GrammarError, GrammarMatcher, Kind
from server.errors import RequestError, UnsupportedParameter


@dataclass(frozen=True, slots=True)
class Structure:
    """A grammar, and the field of the request that it came from."""

    kind: Kind
    source: str
    field: str


async def make_matchers(
    structure: Structure | None, service: Service, count: int
) -> list[GrammarMatcher] | list[None]:
    """One for each choice; None where the text is free.

    Raises:
        RequestError: it is no grammar, or beyond this server's limits.
        ThreadsBusy: others were being read all the time.
    """
    if structure is None:
        return [None] * count
    http, field = service.config.http, structure.field
    if service.grammars is None:
        raise UnsupportedParameter(field, "is not supported for the served models' tokenizer")
    size = len(structure.source.encode(errors="replace"))
    if size > http.max_grammar_bytes:
        raise RequestError(
            f"{field}: {size} bytes is above this server's limit {http.max_grammar_bytes}",
            param=field,
        )
    grammars, asked = service.grammars, (structure.kind, structure.source, count)
    try:
        known = await to_thread.run_sync(grammars.known_matchers, *asked)
        if known is not None:
            return known
        read = partial(grammars.matchers, *asked)
        return await in_time(service.grammar_threads.run, read, http.grammar_seconds, "grammars")
    except TimeoutError as error:
        raise RequestError(
            f"{field}: reading it took longer than this server's limit of "
            f"{http.grammar_seconds:g} s",
            param=field,
        ) from error
    except GrammarError as error:
        raise RequestError(f"{field}: {error}", param=field) from error


def find_structure(request: GenerationRequest) -> Structure | None:
    """The only one that the request asks for. Raises RequestError where there are several."""
    found = [*_response_format(request), *_structured_outputs(request), *_guided(request)]
    if len(found) > 1:
        fields = " and ".join(structure.field for structure in found)
        raise RequestError(f"{fields} exclude each other", param=found[1].field)
    return found[0] if found else None


def _response_format(request: GenerationRequest) -> list[Structure]:
    wanted = request.response_format
    if wanted is None:
        return []
    _check_schemas(wanted)
    if wanted.json_schema is not None:
        schema = json.dumps(wanted.json_schema.schema_)
        return [Structure("json", schema, "response_format.json_schema.schema")]
    if wanted.schema_ is not None:
        return [Structure("json", json.dumps(wanted.schema_), "response_format.schema")]
    is_object = wanted.type == "json_object"
    return [Structure("json", _ANY_OBJECT, "response_format")] if is_object else []


def _check_schemas(wanted: ResponseFormat) -> None:
    """Of a type that takes no schema none is dropped. Raises RequestError."""
    schemas = {"json_schema": wanted.json_schema, "schema": wanted.schema_}
    given = [name for name, schema in schemas.items() if schema is not None]
    for name in given:
        if name not in _SCHEMAS[wanted.type]:
            field = f"response_format.{name}"
            raise RequestError(f"{field} does not go with type {wanted.type}", param=field)
    if len(given) > 1:
        raise RequestError(
            "response_format.json_schema and response_format.schema exclude each other",
            param="response_format.schema",
        )
    if wanted.type == "json_schema" and not given:
        raise RequestError(
            "response_format.json_schema is required", param="response_format.json_schema"
        )


def _structured_outputs(request: GenerationRequest) -> list[Structure]:
    wanted = request.structured_outputs
    if wanted is None:
        return []
    found: list[Structure] = []
    if wanted.json_ is not None:
        found.append(Structure("json", _schema(wanted.json_), "structured_outputs.json"))
    if wanted.json_object:
        found.append(Structure("json", _ANY_OBJECT, "structured_outputs.json_object"))
    texts: list[tuple[Kind, str | None]] = [("regex", wanted.regex), ("lark", wanted.grammar)]
    names = {"regex": "regex", "lark": "grammar"}
    found += [Structure(k, t, f"structured_outputs.{names[k]}") for k, t in texts if t is not None]
    if wanted.choice is not None:
        found.append(Structure("choice", json.dumps(wanted.choice), "structured_outputs.choice"))
    return found


def _guided(request: GenerationRequest) -> list[Structure]:
    found: list[Structure] = []
    if request.guided_json is not None:
        found.append(Structure("json", _schema(request.guided_json), "guided_json"))
    if request.guided_regex is not None:
        found.append(Structure("regex", request.guided_regex, "guided_regex"))
    if request.guided_choice is not None:
        found.append(Structure("choice", json.dumps(request.guided_choice), "guided_choice"))
    if request.guided_grammar is not None:
        found.append(Structure("lark", request.guided_grammar, "guided_grammar"))
    return found


def _schema(schema: object) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


# Fields of response_format that its types take.
_SCHEMAS = {"text": (), "json_object": ("schema",), "json_schema": ("json_schema", "schema")}
_ANY_OBJECT = json.dumps({"type": "object"})

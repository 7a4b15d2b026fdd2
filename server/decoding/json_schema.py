"""What of a JSON schema asks nothing of a text, and would have the whole schema refused."""

from __future__ import annotations

import json
from typing import Any

# Of texts that llguidance makes follow them. To JSON Schema a format is a remark, by default.
FORMATS = frozenset(
    {
        "date",
        "date-time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "time",
        "unknown",
        "uri",
        "uuid",
    }
)
# Where a schema holds others: one, or a list of them; by name.
_INNER = (
    "additionalItems",
    "additionalProperties",
    "allOf",
    "anyOf",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "oneOf",
    "prefixItems",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
)
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


def relaxed(source: str) -> str:
    """A schema without formats that nothing enforces and without `"uniqueItems": false`.

    What is no JSON, or nested too deeply to be read, is left as it is.
    """
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError):
        return source
    return json.dumps(schema) if _relax(schema) else source


def _relax(schema: object) -> bool:
    """In place; whether anything was taken out."""
    is_changed = False
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each
        elif isinstance(each, dict):
            is_changed |= _drop_remarks(each)
            waiting += [each[name] for name in _INNER if name in each]
            for name in _NAMED:
                named = each.get(name)
                waiting += named.values() if isinstance(named, dict) else ()
    return is_changed


def _drop_remarks(schema: dict[str, Any]) -> bool:
    idle = []
    written = schema.get("format")
    if isinstance(written, str) and written not in FORMATS:
        idle.append("format")
    if schema.get("uniqueItems") is False:
        idle.append("uniqueItems")
    for name in idle:
        del schema[name]
    return bool(idle)

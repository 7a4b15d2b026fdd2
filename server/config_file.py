"""Reading a configuration: YAML -> `server.config`; unknown keys are refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from server.config import (
    ContrastiveConfig,
    DecodingConfig,
    EngineConfig,
    HttpConfig,
    LinearConfig,
    ModelConfig,
    PromptLookupConfig,
    Section,
    ServerConfig,
    ShadowConfig,
    TracingConfig,
    WeightedConfig,
)
from server.errors import ConfigError


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> ServerConfig:
    """Read one YAML file and apply `key.path=value` overrides (values are YAML too).

    Raises:
        ConfigError: unreadable, malformed, or against the schema; every problem is named.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the top level must be a mapping")
    for override in overrides:
        _apply_override(data, override)
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], source: str = "config") -> ServerConfig:
    """Validate a plain mapping. Raises ConfigError naming every offending key."""
    try:
        return ServerConfig.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_problem(dict(item)) for item in error.errors()[:10])
        raise ConfigError(f"{source}: {problems}") from error


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: expected key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {text!r} is not valid YAML") from error
    node: Any = data
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, key)
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {key}: {'.'.join(parents)} is not a mapping or list")


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if isinstance(node, dict):
        return node.setdefault(part, {})
    raise ConfigError(f"--set {key}: {part!r} lies below a plain value")


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--set {key}: {part!r} is no index into a list of {len(node)}")
    return int(part)


def _problem(item: dict[str, Any]) -> str:
    location = tuple(part for part in item["loc"] if part not in _METHODS)
    where = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _known_keys(item["loc"]), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{where}: unknown key{hint}"
    got = item.get("input")
    shown = f" (got {got!r:.80})" if isinstance(got, str | int | float | bool) else ""
    return f"{where + ': ' if where else ''}{item['msg'].removeprefix('Value error, ')}{shown}"


_METHODS: dict[str, type[Section]] = {
    "weighted": WeightedConfig,
    "contrastive": ContrastiveConfig,
    "linear": LinearConfig,
}
_SECTIONS: dict[tuple[str, ...], type[Section]] = {
    (): ServerConfig,
    ("models",): ModelConfig,
    **{("combination", method): section for method, section in _METHODS.items()},
    ("decoding",): DecodingConfig,
    ("decoding", "prompt_lookup"): PromptLookupConfig,
    ("engine",): EngineConfig,
    ("engine", "shadow"): ShadowConfig,
    ("http",): HttpConfig,
    ("tracing",): TracingConfig,
}


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys allowed where the unknown one at the end of `location` stands."""
    section = _SECTIONS[tuple(part for part in location[:-1] if isinstance(part, str))]
    return list(section.model_fields)

"""One entry of `--strategies`: `standard`, `cos:gamma=4`, `mixture:kappa=2:shared_coins=false`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from server.config import StrategyName
from server.errors import ConfigError

BASELINE = "standard"


@dataclass(frozen=True, slots=True)
class StrategySpec:
    """What to ask of the server, and the text that results carry for it.

    Attributes:
        label: the entry as it was written.
        override: the request's `cos` object.
    """

    label: str
    override: dict[str, Any]


def parse_strategies(text: str, combination: dict[str, Any] | None) -> tuple[StrategySpec, ...]:
    """Comma-separated entries; `combination` goes into every one. Raises ConfigError."""
    labels = [label for label in text.replace(" ", "").split(",") if label]
    if not labels:
        raise ConfigError("--strategies: name at least one")
    if len(set(labels)) < len(labels):
        raise ConfigError(f"--strategies: named twice in {text!r}")
    shared = {} if combination is None else {"combination": combination}
    return tuple(StrategySpec(label, {**_parse(label), **shared}) for label in labels)


def _parse(label: str) -> dict[str, Any]:
    strategy, *options = label.split(":")
    if strategy not in (known := get_args(StrategyName)):
        raise ConfigError(f"--strategies {label}: unknown strategy, expected one of {known}")
    return {"strategy": strategy, **dict(_option(option, label) for option in options)}


def _option(option: str, label: str) -> tuple[str, Any]:
    key, separator, text = option.partition("=")
    if not separator or not key or not text:
        raise ConfigError(f"--strategies {label}: expected key=value, got {option!r}")
    values = [_scalar(part) for part in text.split("/")]  # gamma=4/1: one for each model
    return key, values[0] if len(values) == 1 else values


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_object(text: str | None, option: str) -> dict[str, Any] | None:
    """The JSON object of an option. Raises ConfigError."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{option}: expected a JSON object")
    return value


def parse_concurrency(text: str) -> tuple[int, ...]:
    """`1,4,16`. Raises ConfigError."""
    parts: Sequence[str] = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--concurrency {text!r}: expected numbers such as 1,4,16")
    return tuple(int(part) for part in parts)

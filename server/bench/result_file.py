"""Measured cells on disk: what was interrupted goes on where it was."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.bench.machine import describe_machine, describe_versions, git_hash
from server.errors import ConfigError

FORMAT = 1


class ResultFile:
    """One JSON document: machine, versions, settings, and a list of cells."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Raises ConfigError where the file was made with other settings, or is none of ours."""
        self._path = path
        self._document: dict[str, Any] = {
            "format": FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "git": git_hash(),
            "versions": describe_versions(),
            "machine": describe_machine(),
            "settings": settings,
            "cells": [],
        }
        if path.exists():
            before = read_document(path)
            if before["settings"] != settings:
                raise ConfigError(f"{path} was measured with {before['settings']}: take another")
            self._document = before

    @property
    def cells(self) -> list[dict[str, Any]]:
        return list(self._document["cells"])

    def append(self, cell: dict[str, Any]) -> None:
        """Written as a whole or not at all."""
        self._document["cells"].append(_rounded(cell))
        beside = self._path.with_name(self._path.name + ".tmp")
        beside.write_text(json.dumps(self._document, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self._path)


def read_document(path: Path) -> dict[str, Any]:
    """A result file. Raises ConfigError."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ConfigError(f"{path}: format {document['format']}, expected {FORMAT}")
        list(document["cells"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no result file: {error}") from error
    return document


def _rounded(value: Any) -> Any:
    """Six digits say all that was measured, and keep the file small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value

"""Prompt files: one `{"prompt": ...}` a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from server.errors import ConfigError

BUNDLED = ("humaneval", "gsm8k", "mmlu", "copy")
_BUNDLED_DIRECTORY = Path(__file__).with_name("prompts")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts of one file, under the name that results carry."""

    name: str
    prompts: tuple[str, ...]


def load_prompts(source: str) -> PromptSet:
    """`source` is a bundled name or a path. Raises ConfigError."""
    path = _BUNDLED_DIRECTORY / f"{source}.jsonl" if source in BUNDLED else Path(source)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(BUNDLED)
        raise ConfigError(f"--prompts {source}: {error} (bundled: {known})") from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"--prompts {source}: no prompts in it")
    return PromptSet(path.stem, tuple(_prompt(line, f"{path}:{number}") for number, line in rows))


def _prompt(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f'{where}: expected a JSON object with a "prompt"') from error
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f"{where}: the prompt must be a string that is not empty")
    return prompt

"""Write docs/configuration.md from the models of server/config.py.

    python -m scripts.configuration > docs/configuration.md
    python -m scripts.configuration --check

The second exits with 1 where the file says something else.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from server.config import ServerConfig

FILE = Path(__file__).parents[1] / "docs" / "configuration.md"
Schema = Mapping[str, Any]

HEAD = """\
# Configuration

Written by `python -m scripts.configuration` from [server/config.py](../server/config.py); a test
holds it to the code.

## Command line

| command | what it does |
| --- | --- |
| `cos-server serve --config FILE` | serves; `--host` and `--port` stand for `http.host` and \
`http.port` |
| `cos-server check --config FILE` | validates the file; with `--load` it loads the models, too |
| `cos-server bench` | measures a running server; `cos-server bench --help` lists its options |
| `cos-server top` | shows a running server in the terminal: `--url`, `--interval` (seconds \
between scrapes), `--window` (seconds that rates cover), `--once` (print one window and exit) |

`serve` and `check` read one YAML file. `--set KEY=VALUE` overrides one entry of it and may be
repeated; the key is a path, with numbers for members of a list, and the value is YAML:
`--set decoding.gamma=6`, `--set models.0.dtype=bfloat16`, `--set 'engine.shadow={}'`. Unknown keys
are refused, and the nearest known one is named.

`--log-level` (`debug`, `info`, `warning` or `error`; `info` by default) and `--log-format` (`text`,
the default, or `json`, one object a line) go with every command, before or behind its name.

Exit codes: 0 done or drained; 1 the engine has failed, or of `bench` a request; 2 bad arguments,
configuration or models, or for `top` no server.

## Environment

| variable | who reads it | what it is |
| --- | --- | --- |
| `COS_API_KEYS` | the server; `http.keys_env` gives it another name | API keys of clients, see \
[security.md](security.md) |
| `COS_API_KEY` | `cos-server bench` and `top` | the key that they send |
| `HF_TOKEN` | the hub's library | access to gated models |
| `COS_CONFIG` | `docker compose` | the server's configuration, a path in the image; \
`configs/default.yaml` if not set |
| `GRAFANA_ADMIN_PASSWORD` | `docker compose` | password of Grafana's `admin`; `admin` if not set |
| `TORCH_CPU_INDEX_URL` | `docker compose`, when it builds | index of PyTorch's CPU wheels, for an \
image without CUDA's libraries |

`docker compose` hands `COS_API_KEYS` and `HF_TOKEN` on to the server.

What may stand in the file follows, section by section. The *law* of a text is the probability
distribution that it is drawn from.
"""


def render() -> str:
    """The whole document."""
    root = ServerConfig.model_json_schema()
    known = root["$defs"]
    return HEAD + "".join(_section(*each, known) for each in _sections("", root, known))


def _sections(path: str, section: Schema, known: Schema) -> Iterator[tuple[str, Schema]]:
    """A section and those below it, each with its path."""
    yield path, section
    for key, field in section["properties"].items():
        for name in _references(field):
            child = known[name]
            yield from _sections(_path(path, key, child), child, known)


def _references(node: Any) -> list[str]:
    """Names of the sections that a field may hold."""
    if isinstance(node, list):
        return [name for item in node for name in _references(item)]
    if not isinstance(node, dict):
        return []
    if "$ref" in node:
        return [_name(node)]
    return [name for part in ("items", "anyOf", "oneOf") for name in _references(node.get(part))]


def _name(reference: Schema) -> str:
    name: str = reference["$ref"].rpartition("/")[2]
    return name


def _path(path: str, key: str, child: Schema) -> str:
    """Of the section under `key`; one for each method of combining."""
    method = child["properties"].get("method")
    below = f"{path}.{key}" if path else key
    return f"{below}: {method['const']}" if method else below


def _section(path: str, section: Schema, known: Schema) -> str:
    rows = "".join(
        _row(path, key, field, section, known) for key, field in section["properties"].items()
    )
    return f"\n## {path or 'The file'}\n\n{section['description']}\n\n{_COLUMNS}{rows}"


_COLUMNS = "| key | values | default | meaning |\n| --- | --- | --- | --- |\n"


def _row(path: str, key: str, field: Schema, section: Schema, known: Schema) -> str:
    is_required = key in section.get("required", ())
    cells = (
        f"`{key}`",
        _values(field, path, key, known),
        "required" if is_required else _default(key, field["default"]),
        field.get("description", ""),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _values(field: Schema, path: str, key: str, known: Schema) -> str:
    """What a field may be, in words."""
    if "$ref" in field:
        title = _path(path, key, known[_name(field)])
        return f"[{title.rpartition(': ')[2]}](#{_anchor(title)})"
    choices = field.get("anyOf") or field.get("oneOf")
    if choices:
        return _either([_values(each, path, key, known) for each in choices])
    if "const" in field:
        return _code(field["const"])
    if "enum" in field:
        return _either([_code(each) for each in field["enum"]])
    if field["type"] == "array":
        item = _values(field["items"], path, key, known)
        count = _range(field, "minItems", "maxItems").removeprefix(" from")
        return f"list of{count} " + re.sub(r"^\w+", r"\g<0>s", item)
    return _plain(field)


def _plain(field: Schema) -> str:
    match field["type"]:
        case "null":
            return "`null`"
        case "boolean":
            return "`true` or `false`"
        case "string":
            return f"text that matches `{field['pattern']}`" if "pattern" in field else "text"
        case kind:
            return f"{kind}{_range(field, 'minimum', 'maximum')}{_open_ends(field)}"


def _range(field: Schema, least: str, most: str) -> str:
    words = ((" from ", least), (" to ", most))
    return "".join(word + _number(field[key]) for word, key in words if key in field)


def _open_ends(field: Schema) -> str:
    words = ((" above ", "exclusiveMinimum"), (" to below ", "exclusiveMaximum"))
    return "".join(word + _number(field[key]) for word, key in words if key in field)


def _default(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return "its defaults"
    if key.endswith("_bytes"):
        return f"{_code(value)} ({_size(value)})"
    return _code(value)


def _size(count: int) -> str:
    unit, name = (1 << 20, "MiB") if count % (1 << 20) == 0 else (1 << 10, "KiB")
    return f"{count / unit:g} {name}"


def _code(value: Any) -> str:
    """As YAML has it."""
    return f"`{value}`" if isinstance(value, str) else f"`{_number(value)}`"


def _number(value: Any) -> str:
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _anchor(title: str) -> str:
    """As GitHub names the heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if --check finds another file."""
    parser = argparse.ArgumentParser(prog="python -m scripts.configuration")
    parser.add_argument("--check", action="store_true", help="compare with the file")
    options = parser.parse_args(argv)
    if not options.check:
        sys.stdout.write(render())
        return 0
    if FILE.read_text(encoding="utf-8") == render():
        return 0
    sys.stderr.write(f"{FILE.name} is out of date: python -m scripts.configuration > {FILE}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())

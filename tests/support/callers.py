"""Servers over tiny models whose chat templates read tools, like those of well-known models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from server.api.call_format import FORMATS, CallFormatName
from server.app import create_app
from server.config_file import parse_config
from tests.support.live_server import run_server
from tests.support.sse import parse
from tests.support.tiny_models import make_pair

# As Hermes's and Qwen's: a mark before and after each call.
_HERMES = """\
{%- if tools -%}
<|im_start|>system
Call {% for tool in tools %}{{ tool.function.name }} {% endfor %}by
<tool_call>
{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}
</tool_call><|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

# As Llama's: a reply that is an object is a call.
_LLAMA3 = """\
{%- if tools -%}
<|im_start|>user
Call {% for tool in tools %}{{ tool.function.name }} {% endfor %}by
{"name": function name, "parameters": dictionary of argument name and its value}<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ "ipython" if message.role == "tool" else message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
TEMPLATES: dict[CallFormatName, str] = {"hermes": _HERMES, "llama3_json": _LLAMA3}

MODEL = "tiny"
ASK = {"role": "user", "content": "the value?"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "look_up": {
        "type": "object",
        "properties": {"key": {"$ref": "#/$defs/key"}, "deep": {"type": "boolean"}},
        "required": ["key", "deep"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},  # random models would write nothing else
        "$defs": {"key": {"enum": ["data", "list", "<tool_call>{"]}},
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "look_up", "parameters": SCHEMAS["look_up"]}},
    {"type": "function", "function": {"name": "now"}},
]
REQUIRED: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required"}
NAMED: dict[str, Any] = {
    "tools": TOOLS,
    "tool_choice": {"type": "function", "function": {"name": "look_up"}},
}


@dataclass
class Caller:
    """A running server whose models write calls in one format."""

    format: CallFormatName
    url: str
    http: httpx.Client

    def post(self, **body: Any) -> httpx.Response:
        defaults = {"model": MODEL, "messages": [ASK], "max_tokens": 150}
        return self.http.post("/v1/chat/completions", json={**defaults, **body})

    def chat(self, **body: Any) -> list[dict[str, Any]]:
        """The choices."""
        response = self.post(**body)
        assert response.status_code == 200, response.text
        choices: list[dict[str, Any]] = response.json()["choices"]
        return choices

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        response = self.post(stream=True, **body)
        assert response.status_code == 200, response.text
        return parse(response.content)

    def write(self, name: str, arguments: str) -> str:
        """A call as the models are taught to write it."""
        form = FORMATS[self.format]
        call = f'{{"name": "{name}", "{form.arguments}": {arguments}}}'
        return f"{form.begin}{form.inner}{call}{form.inner}{form.end}"


@contextmanager
def run_caller(form: CallFormatName, folder: Path, marks: Sequence[str] = ()) -> Iterator[Caller]:
    """Its models are written to `folder`; `marks` are special tokens of theirs."""
    members = make_pair(folder, marks=marks)
    for path in members:
        (path / "chat_template.jinja").write_text(TEMPLATES[form])
    config = parse_config(
        {
            "served_model_name": MODEL,
            "models": [{"name": path.name, "path": str(path)} for path in members],
            "combination": {"method": "weighted", "weights": [0.4, 0.6]},
            "engine": {"kv_memory": "16MiB", "cpu_kernels": "off"},
        }
    )
    with run_server(create_app(config)) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield Caller(form, url, client)

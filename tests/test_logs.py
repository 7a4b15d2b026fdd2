"""JSON log lines: what a finished request leaves, and what it must not."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import httpx
import pytest

from server.api.completion_protocol import CompletionRequest
from server.api.unsupported import check_supported
from server.logs import JsonFormatter, request_id
from tests.support.api import MODEL, make_table_app
from tests.support.live_server import run_server, wait_until


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("server.x", logging.INFO, "x.py", 1, message, ("a",), None)
    made.__dict__.update(extra)
    return made


def test_a_line_is_one_json_object() -> None:
    made = record('say "%s"\n', fields={"tokens": 3})
    made.created = 0.5
    text = JsonFormatter().format(made)
    assert "\n" not in text
    assert json.loads(text) == {
        "time": "1970-01-01T00:00:00.500+00:00",
        "level": "info",
        "logger": "server.x",
        "message": 'say "a"\n',
        "tokens": 3,
    }


def test_errors_and_request_ids_are_keys() -> None:
    made = record("%s failed")
    token = request_id.set("req-1")
    try:
        raise ValueError("broken")
    except ValueError:
        made.exc_info = sys.exc_info()
        line = json.loads(JsonFormatter().format(made))
    finally:
        request_id.reset(token)
    assert line["request_id"] == "req-1"
    assert "ValueError: broken" in line["error"]


_DEBUGGING = """
import logging
from server import logs
logs.configure("debug", "text")
logging.getLogger("sse_starlette.sse").debug("a text")
logging.getLogger("numba.core.ssa").debug("a text")
logging.getLogger("server.api").debug("a number")
"""


def test_libraries_that_would_log_texts_or_all_they_compile_may_not_debug() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DEBUGGING], capture_output=True, text=True, check=True
    )
    assert "a number" in done.stderr
    assert "a text" not in done.stderr


_BARS = """
from server import logs
logs.configure("info", "json")
from transformers.utils import logging
assert not logging.is_progress_bar_enabled()
for _ in logging.tqdm(range(3)):
    pass
"""


def test_no_progress_bar_stands_among_json_lines() -> None:
    done = subprocess.run([sys.executable, "-c", _BARS], capture_output=True, text=True, check=True)
    assert not done.stderr


def test_an_ignored_field_cannot_write_a_line_of_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    body = {"model": MODEL, "prompt": "7", "x\nERROR forged": 1}
    with caplog.at_level("DEBUG", "server.api.unsupported"):
        check_supported(CompletionRequest.model_validate(body))
    assert caplog.messages == ["ignored unknown fields: 'x\\nERROR forged'"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_request_is_one_line_without_its_text(
    caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JsonFormatter().format(record))

    reply_logger = logging.getLogger("server.api.reply")
    handler = Keep()
    reply_logger.addHandler(handler)
    body = {"model": MODEL, "prompt": "7 7 7", "max_tokens": 5, "ignore_eos": True}
    try:
        with caplog.at_level("INFO"), run_server(make_table_app().app) as url:
            headers = {"X-Request-Id": "mine"}
            httpx.post(f"{url}/v1/completions", json={**body, "stream": stream}, headers=headers)
            wait_until(lambda: bool(lines))
    finally:
        reply_logger.removeHandler(handler)
    [line] = [json.loads(text) for text in lines]
    assert line["request_id"] == "mine"
    assert line["id"].startswith("cmpl-")
    assert (line["reason"], line["endpoint"], line["strategy"]) == ("length", "completions", "auto")
    assert (line["prompt_tokens"], line["generated_tokens"]) == (3, 5)
    assert 0 < line["first_token_seconds"] <= line["seconds"]
    assert len(line["proposed"]) == len(line["accepted"]) == 2
    assert "7 7" not in json.dumps(line)

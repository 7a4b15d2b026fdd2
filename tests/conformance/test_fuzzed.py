"""The server against its own OpenAPI document, by requests that schemathesis makes up.

A longer run against a server that is already there:

    schemathesis run http://127.0.0.1:8000/openapi.json -n 300 --exclude-checks \
        positive_data_acceptance

Excluded is the check that every request of the schema's form is served: whether a prompt fits the
context, or a token id the vocabulary, is not in the schema.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.config_file import parse_config
from tests.support.live_server import run_server
from tests.support.tiny_models import make_pair


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two tiny models, with a context short enough that texts without a limit end soon."""
    members = make_pair(tmp_path_factory.mktemp("pair"))
    config = parse_config(
        {
            "served_model_name": "org/tiny",
            "models": [{"name": path.name, "path": str(path)} for path in members],
            "combination": {"method": "weighted", "weights": [0.4, 0.6]},
            "engine": {"kv_memory": "8MiB", "max_length": 48, "calibrate": False},
        }
    )
    with run_server(create_app(config)) as url:
        yield url


def test_no_answer_is_outside_the_document(url: str, tmp_path: Path) -> None:
    """Nor a 5xx, nor a success where the request is outside of it."""
    command: list[Any] = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", 10, "--seed", 1]
    command += ["--exclude-checks", "positive_data_acceptance"]
    command += ["--generation-database", "none", "--no-color"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [num_cases] = re.findall(r"(\d+) generated, \1 passed", done.stdout)
    assert int(num_cases) > 500
    served = re.findall(
        r'^cos_http_requests_total\{.*route="/v1/(.*)",status="200"\} (.*)$',
        httpx.get(f"{url}/metrics").text,
        re.MULTILINE,
    )
    reached = {route for route, count in served if float(count) > 0}
    assert reached >= {"completions", "chat/completions", "models", "models/{name:path}"}

"""What the README tells people to type works as it stands there.

Snippets run against a real server with tiny random models behind it; only the address is changed.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.__main__ import main
from server.app import create_app
from server.bench.cli import add_arguments, make_settings
from server.config_file import load_config, parse_config
from tests.support.live_server import run_server
from tests.support.sse import parse, texts
from tests.support.tiny_models import make_pair

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEFAULT = load_config(ROOT / "configs" / "default.yaml")
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]


def block(language: str, containing: str) -> str:
    [text] = [text for kind, text in BLOCKS if kind == language and containing in text]
    return text


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The default configuration, with tiny models in place of its own."""
    directories = make_pair(tmp_path_factory.mktemp("models"))
    data = DEFAULT.model_dump()
    for member, directory in zip(data["models"], directories, strict=True):
        member.update(path=str(directory), device="cpu")
    data["engine"]["kv_memory"] = "16MiB"
    with run_server(create_app(parse_config(data))) as url:
        yield url


def here(snippet: str, url: str) -> str:
    address = f"http://{DEFAULT.http.host}:{DEFAULT.http.port}"
    assert address in snippet
    return snippet.replace(address, url)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_streams_a_completion(server: str):
    command = here(block("bash", "curl"), server)
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True, timeout=120)
    assert done.stdout.endswith(b"data: [DONE]\n\n")
    assert texts(parse(done.stdout))[0]


def test_sdk_snippet_runs(server: str, tmp_path: Path):
    script = tmp_path / "snippet.py"
    script.write_text(here(block("python", "OpenAI"), server), encoding="utf-8")
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=120)
    assert not done.stderr  # its output is random, and may be empty


def test_snippets_name_the_default_model():
    names = re.findall(r'"?model"?\s*[:=]\s*"([^"]+)"', block("bash", "curl"))
    names += re.findall(r'model="([^"]+)"', block("python", "OpenAI"))
    assert names == [DEFAULT.served_model_name] * 2


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    named = set(re.findall(r"`make ([a-z]+)[^`]*`", prose))
    named |= {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    assert named >= {"serve", "test", "help"}
    for target in named:
        assert re.search(rf"^{target}:.* ## ", makefile, re.MULTILINE), target


def test_bench_command_is_accepted():
    [line] = [line for line in COMMANDS if line.startswith("make bench")]
    [arguments] = re.findall(r'ARGS="([^"]+)"', line)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    make_settings(parser.parse_args(shlex.split(arguments)))


def test_check_command_is_accepted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    assert main(["check", "--config", "configs/default.yaml"]) == 0
    assert not capsys.readouterr().err


def test_examples_of_the_cos_field_are_accepted():
    examples = re.findall(r'`(\{"method".*?\})`', README)
    assert len(examples) == 3
    for example in examples:
        data = {**DEFAULT.model_dump(), "combination": json.loads(example)}
        parse_config(data)


def test_every_strategy_and_configuration_is_listed():
    for strategy in ("auto", "standard", "single", "speculative", "cos", "mixture"):
        assert f"| `{strategy}` |" in README
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"(configs/{path.name})" in README


def test_structure_names_files_that_exist():
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    files = re.findall(r"`((?:\w+/)+\w+\.py)`", text)
    assert files
    for name in files:
        assert (ROOT / name).exists() or (ROOT / "server" / name).exists(), name

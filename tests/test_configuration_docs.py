"""docs/configuration.md is what the code says of the configuration, the commands and compose."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from scripts import configuration
from server.__main__ import main
from server.api_key import VARIABLE
from server.config import HttpConfig
from server.config_file import _SECTIONS
from server.top.cli import add_arguments

TEXT = configuration.FILE.read_text(encoding="utf-8")
COMPOSE = (Path(__file__).parents[1] / "docker-compose.yml").read_text(encoding="utf-8")


def test_it_is_written_from_the_code(capsys: pytest.CaptureFixture[str]):
    assert configuration.main(["--check"]) == 0
    assert configuration.main([]) == 0
    assert capsys.readouterr().out == TEXT


def test_another_file_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(configuration, "FILE", tmp_path / "configuration.md")
    configuration.FILE.write_text("old", encoding="utf-8")
    assert configuration.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err


@pytest.mark.parametrize("section", _SECTIONS.values(), ids=lambda section: section.__name__)
def test_every_entry_has_its_row(section: type):
    for key in section.model_fields:  # type: ignore[attr-defined]
        assert re.search(rf"^\| `{key}` \| .+ \| .+ \| .+ \|$", TEXT, re.MULTILINE), key


def test_links_lead_to_headings():
    anchors = {configuration._anchor(title) for title in re.findall(r"^## (.+)$", TEXT, re.M)}
    links = set(re.findall(r"\]\(#([^)]+)\)", TEXT))
    assert links
    assert links <= anchors


@pytest.mark.parametrize("command", ["serve", "check"])
def test_options_are_documented(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert options >= {"--config", "--set", "--log-level", "--log-format"}
    for option in options:
        assert f"`{option}" in TEXT or f" {option} " in TEXT, option


def test_options_of_top_are_documented():
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    options = {option for action in parser._actions for option in action.option_strings}
    assert options == {"--url", "--interval", "--window", "--once"}
    for option in options:
        assert f"`{option}`" in TEXT, option


def test_variables_are_documented():
    rows = set(re.findall(r"^\| `([A-Z_]+)` \|", TEXT, re.MULTILINE))
    of_compose = set(re.findall(r"\$\{(\w+):-", COMPOSE))
    assert rows == of_compose | {VARIABLE, HttpConfig().keys_env}

"""Every shipped configuration is valid, says what it is, and makes an app."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.app import create_app
from server.config_file import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configs():
    assert ROOT / "configs" / "default.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_makes_an_app(path: Path):
    create_app(load_config(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_what_it_is(path: Path):
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_default_limits_listen_on_this_machine_only(path: Path):
    assert load_config(path).http.host == "127.0.0.1"

"""Where a shortlist comes from, and what is said of one that cannot be used."""

import json

import pytest

from server.errors import ConfigError
from server.runner.loader import load_models
from server.runner.shortlist import Shortlist, find_shortlist
from tests.runner.test_loader import config_of
from tests.support.tiny_models import make_model_dir


@pytest.fixture
def folder(tmp_path):
    return make_model_dir(tmp_path / "model")


def write(path, ids):
    path.write_text(json.dumps(ids))
    return str(path)


def find(setting, folder):
    return find_shortlist("m", setting, str(folder), vocab_size=100)


def test_auto_is_the_file_in_the_directory(folder):
    assert find("auto", folder) is None
    write(folder / "shortlist.json", [9, 4, 99])
    assert find("auto", folder).tolist() == [4, 9, 99]
    assert find(None, folder) is None


@pytest.mark.parametrize(
    "ids", [[], {}, [1, 1], [-1], [100], [1.0], [True], ["1"], [[1]], None], ids=str
)
def test_other_contents_are_refused(folder, tmp_path, ids):
    path = write(tmp_path / "list.json", ids)
    with pytest.raises(ConfigError, match="distinct token ids below 100"):
        find(path, folder)


def test_unreadable_files_are_refused(folder, tmp_path):
    (tmp_path / "broken.json").write_text("[1,")
    for name in ("missing.json", "broken.json"):
        with pytest.raises(ConfigError, match=f"cannot read shortlist .*{name}"):
            find(str(tmp_path / name), folder)


def test_the_loader_uses_it(folder, tmp_path):
    lines: list[str] = []
    path = write(tmp_path / "list.json", [9, 4, 30])
    (runner,) = load_models(config_of(folder, shortlist=path), lines.append).runners
    assert isinstance(runner.deferred, Shortlist)
    assert runner.deferred.ids.tolist() == [4, 9, 30]
    assert any("shortlist of 3 of" in line for line in lines)
    (plain,) = load_models(config_of(folder, shortlist=path), fast=False).runners
    assert plain.deferred is None


def test_other_models_do_without(tmp_path):
    gemma = make_model_dir(tmp_path / "gemma", "gemma2")
    path = write(gemma / "shortlist.json", [1, 2])
    lines: list[str] = []
    (runner,) = load_models(config_of(gemma), lines.append).runners
    assert runner.deferred is None
    assert [line for line in lines if "shortlist" in line] == [
        "model m0: only Llama-shaped models on a CPU may have a shortlist; it is not used"
    ]
    with pytest.raises(ConfigError, match="only Llama-shaped models"):
        load_models(config_of(gemma, shortlist=path))

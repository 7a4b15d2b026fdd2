"""Where a shortlist comes from, and what is said of one that cannot be used."""

import json

import pytest
import torch

from server.errors import ConfigError
from server.runner import self_check
from server.runner.llama_body import LlamaBody
from server.runner.loader import load_models
from server.runner.shortlist import Shortlist, find_shortlist
from tests.runner.test_loader import config_of
from tests.runner.test_packed_linear import needs_bfloat16
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
    assert runner.deferred.shortlist.tolist() == [4, 9, 30]
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


def test_where_no_forward_is_written_out_right_it_is_not_used(folder, tmp_path, monkeypatch):
    right = self_check.self_check

    def check(runner, reference):
        if isinstance(runner._body, LlamaBody):
            raise ConfigError("gives wrong logits")
        right(runner, reference)

    monkeypatch.setattr(self_check, "self_check", check)
    path = write(folder / "shortlist.json", [1, 2])
    lines: list[str] = []
    (runner,) = load_models(config_of(folder), lines.append).runners
    assert runner.deferred is None
    assert sum("it is not used" in line for line in lines) == 1
    with pytest.raises(ConfigError, match="only Llama-shaped models"):
        load_models(config_of(folder, shortlist=path))


@pytest.mark.parametrize("dtype", ["auto", pytest.param("bfloat16", marks=needs_bfloat16)])
def test_scores_do_not_depend_on_the_rows_beside(folder, tmp_path, dtype):
    """A token is drawn alone and verified beside others, by the same scores."""
    path = write(tmp_path / "list.json", [9, 4, 30])
    (runner,) = load_models(config_of(folder, shortlist=path, dtype=dtype)).runners
    assert isinstance(runner.deferred, Shortlist)
    random = torch.Generator().manual_seed(1)
    states = torch.randn(30, runner.deferred.state_size, generator=random).to(runner.dtype)
    together = runner.deferred.shortlist_scores(states)
    assert together.dtype == torch.float32
    assert together.shape == (30, 3)
    for row in range(30):
        alone = runner.deferred.shortlist_scores(states[row : row + 1])
        # Sums may run in another order; activations in 16 bits would differ far more.
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=2e-6)

"""What the command line is turned into, and what it refuses."""

from __future__ import annotations

import argparse

import pytest

from server.bench.cli import add_arguments, make_settings
from server.bench.prompts import BUNDLED, load_prompts
from server.bench.strategy_spec import parse_concurrency, parse_object, parse_strategies
from server.errors import ConfigError


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_strategies_become_overrides_of_a_request():
    specs = parse_strategies(
        "standard, cos:gamma=4, cos:gamma=4/2, mixture:shared_coins=true", None
    )
    assert [spec.override for spec in specs] == [
        {"strategy": "standard"},
        {"strategy": "cos", "gamma": 4},
        {"strategy": "cos", "gamma": [4, 2]},
        {"strategy": "mixture", "shared_coins": True},
    ]
    assert specs[2].label == "cos:gamma=4/2"


def test_a_combination_goes_into_every_strategy():
    combination = parse_object('{"method": "contrastive", "mu": 0.5}', "--combination")
    specs = parse_strategies("standard,cos", combination)
    assert all(spec.override["combination"] == combination for spec in specs)


@pytest.mark.parametrize("text", ["", "standard,standard", "fast", "cos:gamma", "cos:=3", "cos:a="])
def test_wrong_strategies_are_refused(text):
    with pytest.raises(ConfigError, match="--strategies"):
        parse_strategies(text, None)


@pytest.mark.parametrize("text", ["", "0", "1,,4", "1,x", "-1"])
def test_wrong_concurrency_is_refused(text):
    with pytest.raises(ConfigError, match="--concurrency"):
        parse_concurrency(text)


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
@pytest.mark.parametrize("option", ["--combination", "--body"])
def test_wrong_objects_are_refused(text, option):
    with pytest.raises(ConfigError, match=option):
        make_settings(parse(option, text))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_prompts_load(name):
    prompts = load_prompts(name)
    assert prompts.name == name
    assert len(prompts.prompts) >= (6 if name == "copy" else 100)
    assert len(set(prompts.prompts)) == len(prompts.prompts)


@pytest.mark.parametrize("text", ["", "{}\n", "no json\n", '{"prompt": ""}\n', '{"prompt": 3}\n'])
def test_wrong_prompt_files_are_refused(text, tmp_path):
    (tmp_path / "wrong.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="wrong"):
        load_prompts(str(tmp_path / "wrong.jsonl"))


def test_rounds_have_prompts_for_all_that_is_in_flight():
    assert make_settings(parse("--concurrency", "1,4")).concurrency == (1, 4)
    with pytest.raises(ConfigError, match="16 in --rounds 4 are 4 a round: --concurrency 5 would"):
        make_settings(parse("--concurrency", "1,5"))


def test_defaults_make_settings():
    settings = make_settings(parse())
    assert [each.name for each in settings.prompt_sets] == ["humaneval"]
    assert [each.label for each in settings.strategies] == ["standard", "auto"]
    assert settings.ignore_eos
    assert settings.send_seeds


def test_a_round_without_prompts_is_refused():
    with pytest.raises(ConfigError, match="--rounds"):
        make_settings(parse("--num-prompts", "2", "--rounds", "3"))


def test_counts_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        parse("--num-prompts", "0")
    assert "not positive" in capsys.readouterr().err

"""Configuration: overrides, and refusals that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from server.config import (
    ContrastiveConfig,
    LinearConfig,
    ModelConfig,
    ServerConfig,
    WeightedConfig,
    parse_bytes,
)
from server.config_file import load_config, parse_config
from server.errors import ConfigError

VALID: dict[str, Any] = {
    "served_model_name": "pair",
    "models": [{"name": "a", "path": "x"}, {"name": "b", "path": "y"}],
    "combination": {"method": "weighted", "weights": [0.5, 0.5]},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(
        "served_model_name: pair\n"
        "models: [{name: a, path: x}, {name: b, path: y}]\n"
        "combination: {method: weighted, weights: [0.5, 0.5]}\n"
    )
    return file


def sections(model: type[BaseModel] = ServerConfig) -> list[type[BaseModel]]:
    nested = [
        field.annotation
        for field in model.model_fields.values()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    ]
    return [model, *(inner for each in nested for inner in sections(each))]


@pytest.mark.parametrize(
    "section", [*sections(), ModelConfig, WeightedConfig, ContrastiveConfig, LinearConfig]
)
def test_every_field_is_described(section: type[BaseModel]) -> None:
    tags = {"method"}
    for name, field in section.model_fields.items():
        assert field.description or name in tags, f"{section.__name__}.{name}"


def test_overrides(path: Path) -> None:
    config = load_config(path, ["decoding.gamma=[3, 2]", "http.port=0", "models.1.dtype=bfloat16"])
    assert config.decoding.gamma == (3, 2)
    assert config.http.port == 0
    assert config.models[1].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("decoding.gama=3", "decoding.gama: unknown key; did you mean 'gamma'?"),
        ("htp.port=1", "htp: unknown key; did you mean 'http'?"),
        ("combination.weigths=1", "did you mean 'weights'?"),
        ("models.0.pth=x", "models.0.pth: unknown key; did you mean 'path'?"),
        ("tracing.endpoit=x", "tracing.endpoit: unknown key; did you mean 'endpoint'?"),
        ("decoding.prompt_lookup={max_ngrams: 2}", "did you mean 'max_ngram'?"),
        ("engine.shadow={every_second: 3}", "did you mean 'every_seconds'?"),
        ("models.7.path=x", "no index"),
        ("served_model_name.x=1", "not a mapping or list"),
        ("http.port=70000", "http.port"),
        ("http.port", "expected key.path=value"),
        ("http.port={", "not valid YAML"),
        ("decoding.single=c", "decoding.single is 'c'"),
        ("decoding.gamma=[1]", "1 entries for 2 models"),
        ("decoding.prompt_lookup={max_ngram: 2, min_ngram: 3}", "min_ngram 3 is above max_ngram 2"),
        ("decoding.prompt_lookup={min_ngram: 0}", "decoding.prompt_lookup.min_ngram"),
        ("decoding.prompt_lookup={max_tokens: 9}", "max_tokens 9 is above max_gamma 8"),
        ("models.0.name=prompt_lookup", "no model can be called prompt_lookup"),
        ("engine.kv_memory=2GB", "is not a size"),
        ("engine.threads=100000000000", "engine.threads"),
        ("http.host=", "http.host"),
        ("http.host=''", "http.host"),
        ("http.send_seconds=.inf", "http.send_seconds"),
        ("http.send_seconds=3e6", "http.send_seconds"),
        ("http.drain_seconds=.nan", "http.drain_seconds"),
        ("combination.weights=[.nan, 1]", "combination.weights.0"),
    ],
)
def test_refusals_name_the_key(path: Path, override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=r".") as error:
        load_config(path, [override])
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a list", "a: [", "\xff\x00"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        load_config(file)


def test_names_must_differ() -> None:
    with pytest.raises(ConfigError, match="names must differ"):
        parse_config({**VALID, "models": [VALID["models"][0]] * 2})


@pytest.mark.parametrize(("text", "size"), [("1B", 1), ("2KiB", 2048), ("1.5 GiB", 3 << 29)])
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size

"""The command line: one clear line for what is wrong, and exit codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from server import __version__, logs
from server.__main__ import main
from tests.support.tiny_models import make_pair

CONFIG = {
    "served_model_name": "test",
    "models": [{"name": "a", "path": "no/such/a"}, {"name": "b", "path": "no/such/b"}],
    "combination": {"method": "weighted", "weights": [0.5, 0.5]},
    "http": {"port": 0},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    [line] = [line for line in lines if line.startswith("cos-server: error: ")]
    assert not any("Traceback" in line for line in lines)
    return line


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"cos-server {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["serve"], ["check"], ["nonsense"]])
def test_bad_arguments_are_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_check_accepts_a_configuration(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--config", str(config)]) == 0
    assert capsys.readouterr().out == f"{config}: ok\n"


@pytest.mark.parametrize(
    ("before", "behind", "expected"),
    [
        ([], [], ("INFO", False)),
        (["--log-format", "json"], [], ("INFO", True)),
        ([], ["--log-format", "json"], ("INFO", True)),
        (["--log-level", "error"], ["--log-level", "debug"], ("DEBUG", False)),
        (["--log-level", "error"], ["--log-format", "json"], ("ERROR", True)),
    ],
)
def test_logging_is_chosen_on_either_side_of_the_command(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: list[str],
    behind: list[str],
    expected: tuple[str, bool],
) -> None:
    found = []
    monkeypatch.setattr(
        logs, "configure", lambda level, form: found.append((level.upper(), form == "json"))
    )
    assert main([*before, "check", "--config", str(config), *behind]) == 0
    assert found == [expected]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["decoding.gama=3"], "decoding.gama: unknown key; did you mean 'gamma'?"),
        (["decoding.gamma=99"], "gamma 99 is above max_gamma 8"),
        (["combination.weights=[1]"], "combination: 1 weights for 2 models"),
        (["combination.weights=[0.5, 0.6]"], "weights must sum to 1"),
        (["nonsense"], "expected key.path=value"),
        (["http.tls_key=no/such.key"], "http.tls_key needs http.tls_certificate"),
    ],
)
def test_check_names_what_is_wrong(
    config: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], named: str
) -> None:
    options = [word for override in overrides for word in ("--set", override)]
    assert main(["check", "--config", str(config), *options]) == 2
    assert named in error_line(capsys)


@pytest.mark.parametrize("command", [["check", "--load"], ["serve"]])
def test_models_that_cannot_be_loaded_are_code_2(
    config: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert main([*command, "--config", str(config)]) == 2
    assert "no/such/a" in error_line(capsys)


def _truncate(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20_000])


def _narrow(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name][:-1].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _pickle(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def _forget_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def _rename_token(path: Path) -> None:
    vocabulary = path / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace("<|im_start|>", "<|begin|>"))


@pytest.mark.parametrize("command", [["check", "--load"], ["serve"]])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_truncate, "b: cannot read weights"),
        (_narrow, "model.layers.0.mlp.up_proj.weight"),
        (_pickle, "has only pickled weights"),
        (_forget_tokenizer, "has no tokenizer"),
        (_rename_token, "a and b do not share a vocabulary"),
    ],
)
def test_models_that_are_spoilt_are_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    spoil: Callable[[Path], None],
    named: str,
) -> None:
    paths = make_pair(tmp_path / "models")
    spoil(paths[1])
    models = [{"name": n, "path": str(path)} for n, path in zip("ab", paths, strict=True)]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "models": models}))
    assert main([*command, "--config", str(config)]) == 2
    assert named in error_line(capsys)


def test_a_missing_file_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--config", "no/such.yaml"]) == 2
    assert "no/such.yaml: No such file or directory" in error_line(capsys)


def test_a_taken_port_is_code_2(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--config", str(config), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in error_line(capsys)


def test_bench_has_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "--help"])
    assert end.value.code == 0
    assert "--concurrency" in capsys.readouterr().out

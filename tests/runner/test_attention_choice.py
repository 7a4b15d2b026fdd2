"""Which attention a configuration gets, and that the engine's output does not depend on it."""

import importlib

import pytest
import torch

from server.config_file import parse_config
from server.core.combination import Combination
from server.core.sampling_params import SamplingParams
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.errors import ConfigError
from server.runner.attention_choice import choose_attention, has_cpu_kernels
from server.runner.graph_runner import GraphRunner
from server.runner.loader import load_models
from server.runner.operations import TorchOperations
from server.simd import support
from tests.support.engines import decode, make_decoding
from tests.support.tiny_models import make_pair

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def _no_triton(monkeypatch):
    """An installation without Triton."""
    real = importlib.import_module

    def import_module(name):
        if name == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)


def refuse(line):
    pytest.fail(f"nothing to report, got {line!r}")


def test_the_cpu_has_torch_alone():
    assert choose_attention("auto", CPU, refuse) is None
    assert choose_attention("portable", CUDA, refuse) is None


@pytest.mark.usefixtures("_no_triton")
def test_a_gpu_without_triton_falls_back_and_says_so():
    lines: list[str] = []
    assert choose_attention("auto", CUDA, lines.append) is None
    assert len(lines) == 1
    assert "No module named 'triton'" in lines[0]


@pytest.mark.usefixtures("_no_triton")
def test_insisting_on_triton_fails_without_it():
    with pytest.raises(ConfigError, match="engine.attention: triton cannot run on cpu"):
        choose_attention("triton", CPU, refuse)


def test_the_cpu_needs_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        choose_attention("triton", CPU, refuse)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("models"))


def load(directories, **engine):
    lines: list[str] = []
    config = {
        "served_model_name": "tiny",
        "models": [
            {"name": f"m{k}", "path": str(path), "device": "cpu"}
            for k, path in enumerate(directories)
        ],
        "combination": {"method": "contrastive"},
        "engine": {"kv_memory": "8MiB", "max_length": 64, "max_sequences": 4, **engine},
    }
    return load_models(parse_config(config), lines.append), lines


def tokens_of(loaded, max_tokens):
    engine = Engine(
        loaded.runners,
        loaded.tokenizer.backend_tokenizer,
        loaded.eos_token_ids,
        EngineLimits(max_sequences=4, max_step_tokens=64),
    )
    decoding = make_decoding("cos", Combination.contrastive(2, 0.1), 3)
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=t, seed=seed, ignore_eos=True)
        for seed, t in enumerate((0.0, 1.0, 0.7))
    ]
    return decode(engine, [5, 9, 31], params, decoding)


def test_padded_steps_leave_the_output_alone(directories):
    plain, _ = load(directories, cuda_graphs="off")
    padded, _ = load(directories, cuda_graphs="static")
    assert all(isinstance(runner, GraphRunner) for runner in padded.runners)
    assert not any(isinstance(runner, GraphRunner) for runner in plain.runners)
    assert tokens_of(padded, 24) == tokens_of(plain, 24)


def test_kernels_leave_the_output_alone(directories, monkeypatch):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled where a GPU is; see tests/gpu")
    plain, _ = load(directories)
    kernels, lines = load(directories, attention="triton", cuda_graphs="static")
    assert not any("falling back" in line for line in lines)
    assert tokens_of(kernels, 2) == tokens_of(plain, 2)


def test_failing_kernels_are_replaced(directories, monkeypatch):
    """As where no C compiler is found, or a kernel is wrong on this GPU."""

    class Broken:
        @staticmethod
        def supports(group, queries, store, layer, style):
            return True

        @staticmethod
        def write(store, layer, slots, keys, values):
            store.write(layer, slots, keys, values)

        @staticmethod
        def attend_group(group, queries, store, layer, style):
            raise FileNotFoundError("no C compiler")

    monkeypatch.setattr("server.runner.member.choose_attention", lambda *_: Broken)
    loaded, lines = load(directories, cpu_kernels="off")
    assert sum("falling back to torch's attention: no C compiler" in line for line in lines) >= 2
    plain, _ = load(directories, attention="portable")
    assert tokens_of(loaded, 8)
    assert not any(runner.attends_with_kernels for runner in loaded.runners)
    with pytest.raises(ConfigError, match="triton fails here: no C compiler"):
        load(directories, attention="triton")


@pytest.fixture
def _no_numba(monkeypatch):
    """An installation without Numba."""
    monkeypatch.setattr("server.simd.support.missing", lambda: "Numba cannot be imported")


def needs_kernels():
    if reason := support.missing():
        pytest.skip(f"the kernels cannot run here: {reason}")


def test_cpu_kernels_are_used_where_they_run():
    needs_kernels()
    assert has_cpu_kernels("auto", CPU, refuse)
    assert has_cpu_kernels("on", CPU, refuse)
    assert not has_cpu_kernels("off", CPU, refuse)
    assert not has_cpu_kernels("auto", CUDA, refuse)
    kernels = choose_attention("auto", CPU, refuse, cpu_kernels=True)
    assert kernels is importlib.import_module("server.runner.simd_attention")
    assert choose_attention("portable", CPU, refuse, cpu_kernels=True) is None


@pytest.mark.usefixtures("_no_numba")
def test_without_numba_torch_serves_and_says_so(directories):
    lines: list[str] = []
    assert not has_cpu_kernels("auto", CPU, lines.append)
    assert lines == [
        "no kernels on cpu, torch's own operations are slower: Numba cannot be imported"
    ]
    loaded, _ = load(directories)
    assert not any(runner.attends_with_kernels for runner in loaded.runners)
    with pytest.raises(ConfigError, match="cpu_kernels: on, but they cannot run here: Numba"):
        load(directories, cpu_kernels="on")


def test_cpu_kernels_leave_the_output_alone(directories):
    needs_kernels()
    plain, _ = load(directories, cpu_kernels="off")
    kernels, lines = load(directories, cpu_kernels="on")
    assert not any("falling back" in line for line in lines)
    assert all(runner.attends_with_kernels for runner in kernels.runners)
    assert not any(runner.gathers for runner in kernels.runners)
    assert all(runner.gathers for runner in plain.runners)
    assert tokens_of(kernels, 24) == tokens_of(plain, 24)


@pytest.mark.parametrize("error", [None, ZeroDivisionError("compiled wrongly")])
@pytest.mark.parametrize("at_once", [False, True])
def test_failing_operations_are_replaced(directories, monkeypatch, error, at_once):
    """Kernels that give other numbers, or none, one by one or as a program."""
    needs_kernels()
    plain, _ = load(directories, cpu_kernels="off")

    def gate(self, x):
        if error:
            raise error
        return TorchOperations().gate(x) * 1.5

    def run(self, plan, store, output, with_head):
        if error:
            raise error
        return output.fill_(1.5)

    if at_once:
        monkeypatch.setattr("server.runner.simd_layers.SimdLayers._run", run)
    else:
        monkeypatch.setattr("server.runner.simd_layers.SimdLayers.takes", lambda *_: False)
        monkeypatch.setattr("server.runner.simd_operations.SimdOperations.gate", gate)
    loaded, lines = load(directories)
    assert sum("falling back to torch's operations" in line for line in lines) == 2
    assert not any(runner.attends_with_kernels for runner in loaded.runners)
    assert tokens_of(loaded, 24) == tokens_of(plain, 24)
    with pytest.raises(ConfigError, match="engine.cpu_kernels: on, but they fail here"):
        load(directories, cpu_kernels="on")


def test_triton_is_kept_where_the_other_kernels_fail(directories, monkeypatch):
    needs_kernels()
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled where a GPU is; see tests/gpu")

    def gate(self, x):
        raise ZeroDivisionError("compiled wrongly")

    monkeypatch.setattr("server.runner.simd_operations.SimdOperations.gate", gate)
    loaded, lines = load(directories[:1], attention="triton")
    assert [line for line in lines if "falling back" in line] == [
        "m0: falling back to torch's operations: compiled wrongly"
    ]
    assert all(runner.attends_with_kernels for runner in loaded.runners)


def test_faults_of_torch_are_not_taken_for_wrong_logits(directories, monkeypatch):
    def gate(self, x):
        raise ZeroDivisionError("no fault of the model")

    monkeypatch.setattr(TorchOperations, "gate", gate)
    with pytest.raises(ZeroDivisionError):
        load(directories, cpu_kernels="off")


def test_layers_that_the_kernels_do_not_know_are_left_to_torch(tmp_path):
    needs_kernels()
    directories = make_pair(tmp_path, "gemma2")
    loaded, lines = load(directories)
    assert sum("attend in ways that the kernels do not know" in line for line in lines) == 2
    assert all(runner.gathers for runner in loaded.runners)
    assert tokens_of(loaded, 3)

"""Compiled layers give what layers give, and anything that cannot be compiled runs as it is."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from server.config_file import parse_config
from server.core.combination import Combination
from server.core.sampling_params import SamplingParams
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.errors import ConfigError
from server.runner import compiled
from server.runner.base import Batch, Span
from server.runner.compiled import Compiled
from server.runner.graph_runner import GraphRunner
from server.runner.llama_body import LlamaBody
from server.runner.loader import load_models
from tests.runner.test_llama_body import assert_same_course, make_runner, randomised
from tests.support.engines import decode, make_decoding
from tests.support.tiny_models import make_pair


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """The whole of torch.compile but for the code at its end, which takes a C++ compiler."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiled, "BACKEND", counter)
    yield counter
    torch._dynamo.reset()


def refuse(graph, inputs):
    raise FileNotFoundError("no C++ compiler")


def test_layers_are_compiled_whole_and_once(backend):
    """One compilation, for one row and for several, serves all layers of all equal members."""
    plain = make_runner(randomised("qwen3"), page_size=4)
    for _ in range(2):
        model = randomised("qwen3")
        body = LlamaBody(model, packed=False)
        body.compile_layers()
        runner = make_runner(model, body)
        assert_same_course(plain, runner, 4)
        assert backend.frame_count == 4
    # A part of a prompt of which nothing is kept, which leaves the last layer without rows.
    assert runner.forward(Batch((Span([3], 0, [5, 6], 0),))).shape[0] == 0
    body.drop_compiled()
    assert_same_course(plain, runner, 4)


def test_what_is_met_too_late_runs_as_it_is(caplog, monkeypatch):
    """As where the disk is full by then."""
    answers = iter([lambda graph, inputs: graph, refuse])
    monkeypatch.setattr(compiled, "BACKEND", lambda *graph: next(answers)(*graph))
    double = Compiled(lambda x: 2 * x)
    assert double(torch.ones(3)).tolist() == [2.0] * 3
    assert not double.has_failed
    for _ in range(2):
        assert double(torch.ones(3, dtype=torch.int64)).tolist() == [2] * 3
    assert caplog.text.count("no longer compiled") == 1
    assert double(torch.ones(3)).tolist() == [2.0] * 3


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("models"))


def load(directories, dtype="float32", **engine):
    """The pair, and the lines reported."""
    models = [
        {"name": f"m{k}", "path": str(path), "device": "cpu", "dtype": dtype}
        for k, path in enumerate(directories)
    ]
    config = {
        "served_model_name": "tiny",
        "models": models,
        "combination": {"method": "contrastive"},
        "engine": {"kv_memory": "16MiB", "max_length": 64, "max_sequences": 4, **engine},
    }
    lines: list[str] = []
    return load_models(parse_config(config), lines.append), lines


def tokens_of(loaded):
    engine = Engine(
        loaded.runners,
        loaded.tokenizer.backend_tokenizer,
        loaded.eos_token_ids,
        EngineLimits(max_sequences=4, max_step_tokens=64),
    )
    params = [
        SamplingParams(max_tokens=12, temperature=t, seed=seed, ignore_eos=True)
        for seed, t in enumerate((0.0, 1.0, 0.7))
    ]
    decoding = make_decoding("cos", Combination.contrastive(2, 0.1), 3)
    return decode(engine, [5, 9, 31], params, decoding)


def test_compiled_members_write_the_same(directories, backend):
    plain, _ = load(directories)
    ours, lines = load(directories, compile="layers", cuda_graphs="static")
    assert sum("compiled its layers" in line for line in lines) == 2
    num_compiled = backend.frame_count
    assert tokens_of(ours) == tokens_of(plain)
    assert backend.frame_count == num_compiled >= 4  # nothing new while it serves
    assert all(isinstance(runner, GraphRunner) for runner in ours.runners)


def test_without_a_compiler_layers_run_as_they_are(directories, monkeypatch, caplog):
    plain, _ = load(directories)
    monkeypatch.setattr(compiled, "BACKEND", refuse)
    ours, lines = load(directories, compile="layers")
    assert sum("layers are not compiled: " in line for line in lines) == 2
    assert "no longer compiled" not in caplog.text
    assert tokens_of(ours) == tokens_of(plain)


def test_wrong_code_is_not_used(directories, monkeypatch):
    plain, _ = load(directories)
    wrong = lambda graph, inputs: lambda *args: [1.5 * each for each in graph(*args)]  # noqa: E731
    monkeypatch.setattr(compiled, "BACKEND", wrong)
    ours, lines = load(directories, compile="layers")
    assert sum("layers are not compiled: model m" in line for line in lines) == 2
    assert tokens_of(ours) == tokens_of(plain)


def test_off_may_stand_bare_in_yaml():
    config = {
        "served_model_name": "tiny",
        "models": [{"name": "m", "path": "nowhere"}],
        "combination": {"method": "weighted", "weights": [1.0]},
    }
    parsed = parse_config({**config, "engine": {"compile": False, "cuda_graphs": False}})
    assert (parsed.engine.compile, parsed.engine.cuda_graphs) == ("off", "off")
    with pytest.raises(ConfigError, match=r"engine\.compile"):
        parse_config({**config, "engine": {"compile": True}})

"""What only a GPU can show: captured graphs, compiled kernels, and the engine on top of both.

    python -m pytest -m gpu

`tests/runner/test_triton_attention.py` compares the kernels themselves; it runs everywhere.
"""

import random
import warnings

import pytest
import torch

from server.cache.kv_store import KVStore
from server.cache.score_store import ScoreStore
from server.config import parse_config
from server.core.combination import Combination
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.decoding.rng import Purpose, uniforms
from server.decoding.verify import sample
from server.decoding.warp import Warp
from server.engine.engine import Engine, EngineLimits
from server.runner.attention_choice import choose_attention
from server.runner.base import Batch, Span
from server.runner.graph_runner import GraphRunner
from server.runner.llama_body import LlamaBody
from server.runner.loader import load_models
from server.runner.static_shapes import Shapes
from server.runner.torch_runner import TorchRunner
from tests.runner.test_torch_runner import MAX_LENGTH, NUM_SEQUENCES, Schedule, make_tables
from tests.support.engines import generated, make_decoding, run
from tests.support.tiny_models import VOCAB_SIZE, make_model, make_pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CUDA = torch.device("cuda")
SHAPES = Shapes.of(NUM_SEQUENCES, 6, 512, 5)


@pytest.fixture(autouse=True)
def _exact_products():
    """Float32 products in float32, so that texts can be compared token by token."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make_runner(family, *, kernels, fast=False, page_size=4, device=CUDA):
    model = make_model(family).to(device)
    body = LlamaBody(model, packed=False) if fast else None
    short = choose_attention("triton", device, pytest.fail) if kernels else None
    store = KVStore(1 + NUM_SEQUENCES * MAX_LENGTH, page_size)
    return TorchRunner("tiny", model, VOCAB_SIZE, MAX_LENGTH, store, body, short_attention=short)


def captured(runner):
    lines: list[str] = []
    graphs = GraphRunner(runner, SHAPES, capture=True)
    graphs.warm_up(lines.append)
    assert graphs.num_graphs == len(SHAPES.all()), lines
    return graphs


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize(
    ("family", "fast"),
    [("llama", True), ("llama", False), ("qwen3", True), ("mistral", True), ("gemma2", False)],
)
def test_kernels_and_graphs_equal_the_cpu(family, fast, page_size):
    """Ragged batches that grow and roll back, by every way of running them."""
    rng = random.Random(page_size)
    schedule = Schedule(rng, make_tables(rng, page_size, in_order=False))
    reference = make_runner(family, kernels=False, page_size=page_size, device="cpu")
    runners = {
        "portable": make_runner(family, kernels=False, fast=fast, page_size=page_size),
        "kernels": make_runner(family, kernels=True, fast=fast, page_size=page_size),
        "graphs": captured(make_runner(family, kernels=True, fast=fast, page_size=page_size)),
    }
    num_replayed = 0
    for _ in range(30):
        batch, _ = schedule.next_batch()
        num_replayed += SHAPES.find(batch) is not None
        plain = reference.forward(batch)
        for name, runner in runners.items():
            ours = runner.forward(batch).cpu()
            limit = 1e-4 * float(plain.abs().max()) if len(plain) else 0.0
            torch.testing.assert_close(ours, plain, rtol=0, atol=limit, msg=name)
    assert num_replayed > 5


def test_graphs_in_sixteen_bits_equal_eager():
    model = make_model("llama").to(CUDA, torch.bfloat16)
    short = choose_attention("triton", CUDA, pytest.fail)
    store = KVStore(40, 4)
    body = LlamaBody(model, packed=False)
    runner = TorchRunner("tiny", model, VOCAB_SIZE, MAX_LENGTH, store, body, short_attention=short)
    graphs = captured(runner)
    for count in (1, 2, 3):
        batch = Batch(tuple(Span([1 + i, 11 + i], 0, [5, 6 + i, 7], 3) for i in range(count)))
        eager = runner.forward(batch).float()
        replayed = graphs.forward(batch).float()
        torch.testing.assert_close(replayed, eager, rtol=0, atol=2e-2 * float(eager.abs().max()))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("models"))


def load(directories, device, report=None, **engine):
    config = {
        "served_model_name": "tiny",
        "models": [
            {"name": f"m{k}", "path": str(path), "device": device, "dtype": "float32"}
            for k, path in enumerate(directories)
        ],
        "combination": {"method": "contrastive"},
        "engine": {"kv_memory": "64MiB", "max_length": 128, "max_sequences": 8, **engine},
    }
    return load_models(parse_config(config), report)


def texts(loaded, strategy, temperature):
    engine = Engine(
        loaded.runners,
        loaded.tokenizer.backend_tokenizer,
        loaded.eos_token_ids,
        EngineLimits(max_sequences=8, max_step_tokens=64),
    )
    decoding = make_decoding(strategy, Combination.contrastive(2, 0.1), 4)
    sequences = [
        Sequence.start(
            str(i),
            prompt,
            SamplingParams(max_tokens=40, temperature=temperature, seed=i, ignore_eos=True),
            decoding,
        )
        for i, prompt in enumerate([[5, 9, 31], [7] * 40, [100], list(range(60, 80))] * 2)
    ]
    deltas = run(engine, sequences)
    return [generated(deltas[sequence.id]) for sequence in sequences]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("strategy", ["standard", "cos"])
def test_texts_are_those_of_the_cpu(directories, strategy, temperature):
    """Greedy, and sampled with the same seeds, whatever runs the models."""
    expected = texts(load(directories, "cpu"), strategy, temperature)
    for engine in ({}, {"cuda_graphs": "off"}, {"attention": "portable"}):
        assert texts(load(directories, "cuda", **engine), strategy, temperature) == expected


def test_graphs_are_what_a_gpu_gets(directories):
    loaded = load(directories, "cuda")
    assert all(isinstance(runner, GraphRunner) for runner in loaded.runners)
    assert all(runner.num_graphs > 0 for runner in loaded.runners)
    portable = load(directories, "cuda", attention="portable")
    assert not any(isinstance(runner, GraphRunner) for runner in portable.runners)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_only_reading_tokens_waits(directories):
    """What a step enqueues between a forward and its tokens, torch's own check of waiting on."""
    (runner, _) = load(directories, "cuda").runners
    scores = ScoreStore(8, 6, VOCAB_SIZE, [runner.dtype], [runner.device])
    sequences = [
        Sequence.start(
            str(i),
            [5 + i, 9],
            SamplingParams(max_tokens=4, temperature=0.7, min_p=0.1, seed=i),
            make_decoding("cos", Combination.contrastive(2, 0.1), 4),
        )
        for i in range(3)
    ]
    places = [(sequence, 2) for sequence in sequences]
    batch = Batch(tuple(Span([1 + i], 0, [5 + i, 9], 1) for i in range(3)))
    for mode in ("default", "error"):  # kernels are compiled the first time
        torch.cuda.set_sync_debug_mode(mode)
        try:
            scores.write(0, [0, 6, 12], runner.forward(batch))
            logits = scores.read(0, [0, 6, 12], runner.device)
            probs = Warp(places, frozenset(), runner.device).probs(logits)
            draws = uniforms([0, 1, 2], [2, 2, 2], Purpose.DRAW, runner.device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(sample(probs, draws)) == 3


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_drafting_waits_for_nothing(directories):
    """Steps that leave their tokens unread, by torch's own check of waiting."""
    loaded = load(directories, "cuda")
    tokenizer = loaded.tokenizer.backend_tokenizer
    engine = Engine(loaded.runners, tokenizer, frozenset(), EngineLimits(max_sequences=8))
    decoding = make_decoding("cos", Combination.contrastive(2, 0.1), (4, 0), verification="token")
    for i in range(3):
        params = SamplingParams(max_tokens=40, seed=i, ignore_eos=True, top_p=0.9)
        engine.add(Sequence.start(str(i), [5 + i, 9], params, decoding))
    num_ahead = 0
    while engine.has_work:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if engine.is_ahead:
            num_ahead += 1
            assert not [warning for warning in caught if "synchroniz" in str(warning.message)]
    assert num_ahead > 20


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_compiled_layers_write_the_same(directories):
    expected = texts(load(directories, "cpu"), "cos", 1.0)
    lines: list[str] = []
    loaded = load(directories, "cuda", lines.append, compile="layers")
    assert sum("compiled its layers" in line for line in lines) == 2
    assert all(runner.num_graphs > 0 for runner in loaded.runners)
    assert texts(loaded, "cos", 1.0) == expected


def test_a_model_that_cannot_be_captured_runs_eagerly():
    """Experts are picked by data, which a graph cannot follow.

    The last test: with some releases of torch a failed capture leaves the allocator in its pool.
    """
    runner = make_runner("gpt_oss", kernels=True)
    lines: list[str] = []
    graphs = GraphRunner(runner, SHAPES, capture=True)
    graphs.warm_up(lines.append)
    batch = Batch((Span([1], 0, [5, 6], 2),))
    plain = make_runner("gpt_oss", kernels=False, device="cpu").forward(batch)
    ours = graphs.forward(batch).cpu()
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
    assert graphs.num_graphs or "running without CUDA graphs" in lines[-1]

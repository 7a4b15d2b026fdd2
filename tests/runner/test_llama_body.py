"""The forward written out for Llama-shaped models gives what transformers' own gives."""

import random

import pytest
import torch
from torch import nn

from server.cache.kv_store import KVStore
from server.config_file import parse_config
from server.core.combination import Combination
from server.core.sampling_params import SamplingParams
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.errors import ConfigError
from server.runner import llama_body, self_check
from server.runner.architecture import pin_rope
from server.runner.base import Batch, Span
from server.runner.llama_body import LlamaBody, is_llama_shaped
from server.runner.loader import load_models
from server.runner.packed_linear import pack_weights
from server.runner.shortlist import Shortlist
from server.runner.torch_runner import TorchRunner, TransformersBody
from server.simd import support
from tests.runner.test_packed_linear import needs_bfloat16
from tests.runner.test_torch_runner import (
    MAX_LENGTH,
    NUM_SEQUENCES,
    Schedule,
    assert_close,
    make_tables,
)
from tests.support.engines import decode, make_decoding
from tests.support.tiny_models import FAMILIES, VOCAB_SIZE, make_model, make_model_dir, make_pair

FAST = ("llama", "qwen2", "qwen3", "mistral")
needs_kernels = pytest.mark.skipif(
    support.missing() is not None, reason=f"the CPU's kernels cannot run: {support.missing()}"
)
SHAPES = [
    *((family, {}) for family in FAST),
    ("llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 2}),
    (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
]


def randomised(family, **settings):
    """Norms and biases start as ones and zeros, which would hide their being swapped."""
    model = make_model(family, **settings).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def rounded(model):
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    return model


def make_runner(model, body=None, page_size=4):
    store = KVStore(1 + NUM_SEQUENCES * MAX_LENGTH, page_size)
    return TorchRunner("tiny", model, VOCAB_SIZE, MAX_LENGTH, store, body)


def assert_same_course(generic, fast, page_size):
    """Ragged packed batches with growth and rollback."""
    rng = random.Random(page_size)
    schedule = Schedule(rng, make_tables(rng, page_size, in_order=page_size == 16))
    for _ in range(12):
        batch, _ = schedule.next_batch()
        logits, plain = fast.forward(batch), generic.forward(batch)
        assert logits.shape == plain.shape
        if len(plain):
            torch.testing.assert_close(
                logits, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max())
            )


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize(("family", "settings"), SHAPES)
def test_same_as_transformers(family, settings, page_size):
    generic = make_runner(randomised(family, **settings), page_size=page_size)
    model = randomised(family, **settings)
    assert is_llama_shaped(model)
    fast = make_runner(model, LlamaBody(model, packed=False), page_size)
    assert_same_course(generic, fast, page_size)


@pytest.mark.parametrize(
    ("packed", "kernels"),
    [
        (False, False),
        pytest.param(True, False, marks=needs_bfloat16),
        pytest.param(True, True, marks=[needs_bfloat16, needs_kernels]),
    ],
)
@pytest.mark.parametrize(("family", "settings"), SHAPES)
def test_sixteen_bits_are_no_less_exact(family, settings, packed, kernels):
    """As a GPU computes it, or a CPU: as near to float32 as transformers' own is."""
    exact = make_runner(randomised(family, **settings).bfloat16().float())
    plain = make_runner(randomised(family, **settings).bfloat16())
    model = randomised(family, **settings).bfloat16()
    ours = make_runner(model, LlamaBody(model, packed, kernels=kernels))
    rng = random.Random(0)
    schedule = Schedule(rng, make_tables(rng, 4, in_order=False))
    errors = {"plain": 0.0, "ours": 0.0}
    for _ in range(8):
        batch, _ = schedule.next_batch()
        logits = exact.forward(batch)
        for name, runner in (("plain", plain), ("ours", ours)):
            rounded_logits = runner.forward(batch)
            assert rounded_logits.dtype == torch.bfloat16
            errors[name] += float((rounded_logits.float() - logits).square().sum())
    assert 0 < errors["ours"] < 1.2 * errors["plain"]


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("family", FAST)
def test_same_with_packed_weights(family, kernels):
    plain, model = (rounded(randomised(family)) for _ in range(2))
    pack_weights(plain)
    body = LlamaBody(model, packed=True, kernels=kernels)
    assert body.packing.packed == body.packing.considered > 0
    assert_same_course(make_runner(plain), make_runner(model, body), 4)


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize(("family", "settings"), SHAPES)
def test_same_with_weights_from_bfloat16(family, settings, kernels):
    """All of them packed times a power of two."""
    plain, model = (randomised(family, **settings) for _ in range(2))
    for each in (plain, model):
        for parameter in each.parameters():
            parameter.copy_(parameter.bfloat16())
            if parameter.dim() == 2:
                parameter[0, 0] = 1.0078125 * 2**-20
    body = LlamaBody(model, packed=True, kernels=kernels)
    assert body.packing.packed == body.packing.considered
    assert_same_course(make_runner(plain), make_runner(model, body), 4)


@needs_kernels
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
)
def test_logits_do_not_depend_on_what_is_computed_beside_them(tmp_path, dtype):
    """To the last bit: alone, among others, token by token or all at once."""
    member = {"name": "m", "path": str(make_model_dir(tmp_path / "m")), "device": "cpu"}
    member["dtype"] = str(dtype).removeprefix("torch.")
    engine = {"max_sequences": 4, "max_length": 96, "cpu_kernels": "on"}
    config = {"served_model_name": "tiny", "models": [member], "engine": engine}
    combination = {"method": "weighted", "weights": [1.0]}
    (runner,) = load_models(parse_config({**config, "combination": combination})).runners
    rng = random.Random(0)
    texts = [[rng.randrange(300) for _ in range(length)] for length in (40, 21, 33)]
    pages = [list(range(1 + 4 * number, 5 + 4 * number)) for number in range(3)]
    spans = [Span(table, 0, text, len(text)) for table, text in zip(pages, texts, strict=True)]
    together = runner.forward(Batch(tuple(spans))).split([len(text) for text in texts])
    for text, expected in zip(texts, together, strict=True):
        done = 0
        while done < len(text):
            count = min(rng.choice((1, 1, 2, 5, 17)), len(text) - done)
            logits = runner.forward(
                Batch((Span(pages[0], done, text[done : done + count], count),))
            )
            assert torch.equal(logits, expected[done : done + count])
            done += count


def test_a_weight_beyond_sixteen_bits_is_kept():
    plain, model = (rounded(randomised("llama")) for _ in range(2))
    for each in (plain, model):
        each.model.layers[0].self_attn.k_proj.weight[1, 2] = 1 + 2**-20
    body = LlamaBody(model, packed=True)
    assert 0 < body.packing.packed < body.packing.considered
    assert_same_course(make_runner(plain), make_runner(model, body), 4)


def test_pinned_rope_is_used():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]}
    rope_parameters = {**rope, **factors, "original_max_position_embeddings": 32}
    runners = []
    for fast in (False, True):
        model = make_model("llama", rope_parameters=rope_parameters)
        pin_rope("tiny", model, MAX_LENGTH)
        runners.append(make_runner(model, LlamaBody(model, packed=False) if fast else None))
    batch = Batch((Span([1, 2], 0, [5, 6, 7, 8], 4),))
    assert_close(runners[1].forward(batch), runners[0].forward(batch))


@pytest.mark.parametrize(("family", "settings"), SHAPES)
@torch.inference_mode()
def test_kept_angles_are_those_that_are_computed(family, settings):
    """To the last bit, as far as they are kept and beyond."""
    kept, anew = (
        make_runner(model, LlamaBody(model, packed=False, max_length=max_length))
        for max_length in (20, 0)
        for model in [randomised(family, **settings).bfloat16()]
    )
    rng = random.Random(0)
    tables = make_tables(rng, 4, in_order=False)
    for num_past, count in ((0, 9), (9, 1), (10, 10), (20, 1), (21, 3)):
        batch = Batch((Span(tables[0], num_past, rng.sample(range(90), count), count),))
        assert torch.equal(kept.forward(batch), anew.forward(batch))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(FAST)))
def test_other_families_are_left_to_transformers(family):
    assert not is_llama_shaped(make_model(family))


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()),
        lambda layer: layer.add_module("extra", nn.Identity()),
        lambda layer: setattr(layer.self_attn, "q_proj", Subclass(32, 32)),
        lambda layer: setattr(layer.self_attn, "head_dim", 4),
    ],
)
def test_other_shapes_are_left_to_transformers(change):
    model = make_model("llama")
    assert is_llama_shaped(model)
    change(model.model.layers[1])
    assert not is_llama_shaped(model)


@pytest.mark.parametrize("has_instructions", [False, True])
def test_other_dtypes_are_left_to_transformers(monkeypatch, has_instructions):
    monkeypatch.setattr(llama_body, "multiplies_bfloat16", lambda: has_instructions)
    assert is_llama_shaped(make_model("llama").bfloat16()) == has_instructions
    assert not is_llama_shaped(make_model("llama").half())


def config_of(*paths):
    members = [{"name": f"m{i}", "path": str(path)} for i, path in enumerate(paths)]
    weights = [1 / len(paths)] * len(paths)
    return parse_config(
        {
            "served_model_name": "tiny",
            "models": members,
            "combination": {"method": "weighted", "weights": weights},
            "engine": {"max_sequences": 4, "max_length": 96},
        }
    )


def body_of(runner):
    return type(runner._body)


def test_loader_chooses(tmp_path):
    config = config_of(make_model_dir(tmp_path / "a"), make_model_dir(tmp_path / "b", "gemma2"))
    assert [body_of(r) for r in load_models(config).runners] == [LlamaBody, TransformersBody]
    plain = load_models(config, fast=False)
    assert [body_of(runner) for runner in plain.runners] == [TransformersBody] * 2


def test_wrong_logits_fall_back_with_one_line(tmp_path, monkeypatch):
    """A model type that grew a twist the shape does not show."""
    right = self_check.self_check

    def check(runner, reference):
        if body_of(runner) is LlamaBody:
            raise ConfigError("gives wrong logits")
        right(runner, reference)

    monkeypatch.setattr(self_check, "self_check", check)
    lines: list[str] = []
    loaded = load_models(config_of(make_model_dir(tmp_path / "a")), lines.append)
    assert body_of(loaded.runners[0]) is TransformersBody
    *kernels, last = [line for line in lines if "falling back" in line]
    assert last == "m0: falling back to the forward of transformers: gives wrong logits"
    without = "m0: falling back to torch's operations: gives wrong logits"
    assert kernels == ([] if support.missing() else [without])


def test_self_check_sees_a_wrong_body():
    model = make_model("llama")
    reference = self_check.reference_logits(model, VOCAB_SIZE)
    model.model.norm.weight.data[:16] *= 2
    body = LlamaBody(model, packed=False)
    store = KVStore(self_check.NUM_PAGES, self_check.PAGE_SIZE)
    runner = TorchRunner("tiny", model, VOCAB_SIZE, MAX_LENGTH, store, body)
    with pytest.raises(ConfigError, match="wrong logits"):
        self_check.self_check(runner, reference)


def test_greedy_text_of_a_pair_is_the_same(tmp_path):
    """Proposals, rollback and scoring, in a batch, by both bodies."""
    config = config_of(*make_pair(tmp_path))
    decoding = make_decoding("cos", Combination.contrastive(2, 0.2), gamma=3)
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (40, 40, 25)]
    texts = []
    for fast in (True, False):
        loaded = load_models(config, fast=fast)
        engine = Engine(
            loaded.runners,
            loaded.tokenizer.backend_tokenizer,
            loaded.eos_token_ids,
            EngineLimits(max_step_tokens=32),
        )
        texts.append(decode(engine, [5, 9, 200, 31], params, decoding))
    assert texts[0] == texts[1]
    assert len(texts[0][0]) == 40


@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_deferred_scores_are_those_of_the_forward(packed):
    ids = torch.tensor([3, 4, 90, VOCAB_SIZE - 1])
    generic = make_runner(rounded(randomised("llama", tie_word_embeddings=True)))
    body = LlamaBody(rounded(randomised("llama", tie_word_embeddings=True)), packed, ids)
    fast = make_runner(generic.model, body)
    head = Shortlist(fast, body, ids)
    batch = Batch((Span((1, 2), 0, (5, 9, 7, 31, 8), 3), Span((3,), 0, (2, 4), 1)))
    states = head.states(batch)
    assert states.shape == (4, head.state_size)
    logits = fast.forward(batch)
    assert_close(logits, generic.forward(batch))
    torch.testing.assert_close(head.scores(states), logits)
    listed = head.shortlist_scores(states)
    assert head.shortlist.tolist() == ids.tolist()
    torch.testing.assert_close(listed, logits[:, ids])


def test_a_short_head_keeps_the_bias_and_counts_as_memory():
    model = rounded(randomised("llama", tie_word_embeddings=False))
    model.lm_head.bias = nn.Parameter(torch.arange(VOCAB_SIZE).float(), requires_grad=False)
    weight, bias = model.lm_head.weight.clone(), model.lm_head.bias.clone()
    plain = LlamaBody(rounded(randomised("llama", tie_word_embeddings=False)), packed=True)
    body = LlamaBody(model, True, torch.tensor([7, 1]))
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert body.short_head is not None
    torch.testing.assert_close(body.short_head(x), x @ weight[[7, 1]].T + bias[[7, 1]])
    assert plain.packing.saved - body.packing.saved == 2 * 2 * weight.shape[1]

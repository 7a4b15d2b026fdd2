"""Loading: what comes out, and one clear line for whatever is wrong."""

import json
import logging
import os
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from server.config_file import parse_config
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.errors import ConfigError
from server.runner import cgroup, llama_body, loader, member, memory, self_check
from server.runner.base import Batch, Span
from server.runner.graph_runner import GraphRunner
from server.runner.loader import load_models
from server.runner.packed_linear import multiplies_in_kernels
from server.simd import support
from tests.runner.test_packed_linear import needs_bfloat16
from tests.support.table_lm import DigitDecoder
from tests.support.tiny_gguf import write_gguf
from tests.support.tiny_models import (
    VOCAB_SIZE,
    make_model,
    make_model_dir,
    make_pair,
    make_tokenizer,
    make_triple,
)


def config_of(*paths, engine=None, **member):
    models = [{"name": f"m{i}", "path": str(path), **member} for i, path in enumerate(paths)]
    weights = [1 / len(paths)] * len(paths)
    return parse_config(
        {
            "served_model_name": "tiny",
            "models": models,
            "combination": {"method": "weighted", "weights": weights},
            "engine": {"max_sequences": 4, **(engine or {})},
        }
    )


def refusal(config):
    with pytest.raises(ConfigError) as caught:
        load_models(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


@pytest.fixture
def llama(tmp_path):
    return make_model_dir(tmp_path / "llama")


def test_triple(tmp_path, caplog):
    lines: list[str] = []
    with caplog.at_level(logging.INFO, "server.runner"):
        loaded = load_models(config_of(*make_triple(tmp_path)), lines.append)
    assert [runner.name for runner in loaded.runners] == ["m0", "m1", "m2"]
    assert loaded.vocab_size == VOCAB_SIZE
    assert loaded.max_length == 512
    assert loaded.eos_token_ids == {make_tokenizer().eos_token_id}
    assert loaded.tokenizer.chat_template
    assert {runner.num_pages for runner in loaded.runners} == {1 + 4 * 512 // 16}
    assert [record.getMessage() for record in caplog.records] == lines
    assert any("m1: self-check passed" in line for line in lines)
    logits = loaded.runners[2].forward(Batch((Span([1], 0, [1, 2, 3], 1),)))
    assert logits.shape == (1, VOCAB_SIZE)


def test_members_of_different_padding_share_a_vocabulary(tmp_path):
    first = make_model_dir(tmp_path / "a", "qwen2", num_padding=8)
    second = make_model_dir(tmp_path / "b", "qwen2", num_padding=64, seed=1)
    loaded = load_models(config_of(first, second))
    assert loaded.vocab_size == VOCAB_SIZE
    for runner in loaded.runners:
        assert runner.forward(Batch((Span([1], 0, [5], 1),))).shape == (1, VOCAB_SIZE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_weights(llama, dtype):
    loaded = load_models(config_of(llama, dtype=dtype))
    assert loaded.runners[0].dtype == getattr(torch, dtype)


def test_context_is_the_strictest(tmp_path):
    short = make_model_dir(tmp_path / "short", max_position_embeddings=64)
    long = make_model_dir(tmp_path / "long", max_position_embeddings=128)
    assert load_models(config_of(short, long)).max_length == 64
    assert load_models(config_of(short, long, engine={"max_length": 50})).max_length == 50
    message = refusal(config_of(long, short, engine={"max_length": 100}))
    assert "engine.max_length is 100" in message
    assert "m1 takes at most 64" in message


def test_end_of_text_is_what_the_expert_says(tmp_path):
    amateur, expert = make_pair(tmp_path)
    edit_json(amateur / "generation_config.json", eos_token_id=[5])
    edit_json(expert / "generation_config.json", eos_token_id=[7, 100_000])
    edit_json(expert / "config.json", eos_token_id=8)
    loaded = load_models(config_of(amateur, expert))
    assert loaded.eos_token_ids == {7, 8, make_tokenizer().eos_token_id}


def test_other_vocabulary(tmp_path, llama):
    tokenizer = make_tokenizer(VOCAB_SIZE - 1)
    tokenizer.add_tokens(["<extra>"])
    other = make_model_dir(tmp_path / "other", tokenizer=tokenizer)
    message = refusal(config_of(llama, other))
    assert "m0 and m1 do not share a vocabulary" in message
    assert "token '<|im_end|>' is 317 in m0 and 316 in m1" in message


def test_fewer_rows_than_tokens(tmp_path):
    path = make_model_dir(tmp_path / "small", num_padding=-4, pad_token_id=None, eos_token_id=1)
    assert "316 embedding rows for a tokenizer of 320" in refusal(config_of(path))


def test_missing_path(tmp_path, monkeypatch):
    assert "no directory or GGUF file" in refusal(config_of(tmp_path / "nowhere"))
    assert "no directory or GGUF file" in refusal(config_of("models/a/b"))
    # Two parts read like a hub id, but the first is a folder that is here.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "no directory or GGUF file" in refusal(config_of("here/nowhere"))
    # What the default configurations name is never looked for elsewhere.
    message = refusal(config_of("models/smollm2-proposer"))
    assert message.endswith("models/smollm2-proposer (`make models` makes the default pair)")


def test_a_hub_id_has_a_revision(llama, monkeypatch):
    asked = []

    def read(path, **options):
        asked.append((path, options["revision"]))
        raise OSError("no network")

    monkeypatch.setattr(AutoConfig, "from_pretrained", read)
    assert "no network" in refusal(config_of("org/name", revision="0123abc"))
    assert asked == [("org/name", "0123abc")]
    assert "revision is for hub ids" in refusal(config_of(llama, revision="main"))


def test_threads_are_those_of_the_container(llama, monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr(cgroup, "num_cpus", lambda: 2)
        load_models(config_of(llama))
        assert torch.get_num_threads() == 2
        load_models(config_of(llama, engine={"threads": 4}))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_file_that_is_no_gguf(llama):
    assert "not .gguf" in refusal(config_of(llama / "model.safetensors"))


def test_no_tokenizer(llama):
    (llama / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(config_of(llama))


def test_no_config(llama):
    (llama / "config.json").unlink()
    assert "has no config.json" in refusal(config_of(llama))


def test_config_that_is_no_json(llama):
    (llama / "config.json").write_text("{")
    assert "cannot read config.json" in refusal(config_of(llama))


def test_code_in_the_directory_is_not_run(llama):
    edit_json(llama / "config.json", model_type="own", auto_map={"AutoConfig": "evil.Config"})
    (llama / "evil.py").write_text("raise SystemExit('ran')")
    assert "code shipped with the model" in refusal(config_of(llama))


def test_pickles_only(llama):
    weights = load_file(llama / "model.safetensors")
    torch.save(weights, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    assert "only pickled weights" in refusal(config_of(llama))


class Pickled:
    """What a hostile checkpoint holds: opening it would run this."""

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))

    def __init__(self, folder):
        self.folder = folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
@pytest.mark.parametrize("beside", ["nothing", "good weights", "broken weights"])
def test_a_pickle_is_never_opened(tmp_path, llama, name, beside):
    """Neither alone, nor beside other weights, nor where these cannot be read."""
    trap = tmp_path / "opened"
    (llama / name).write_bytes(pickle.dumps(Pickled(trap)))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    weights = llama / "model.safetensors"
    if beside == "good weights":
        load_models(config_of(llama))
    else:
        weights.unlink()
        if beside == "broken weights":
            weights.write_bytes(b"broken")
        expected = "only pickled" if beside == "nothing" else "cannot read weights"
        assert expected in refusal(config_of(llama))
    assert not trap.exists()


def test_pickles_of_an_index_are_not_opened(tmp_path, llama):
    """An index that calls a pickle one of the model's safetensors."""
    trap = tmp_path / "opened"
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    (llama / "model-1.safetensors").write_bytes(pickle.dumps(Pickled(trap)))
    for name in ("model-1.safetensors", "pytorch_model.bin"):
        shutil.copy(llama / "model-1.safetensors", llama / "pytorch_model.bin")
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
        (llama / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "cannot read weights" in refusal(config_of(llama))
    assert not trap.exists()


def header(data, length=None):
    text = json.dumps(data).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "head",
    [
        header({}, length=2**63),
        header({}, length=10**8),
        header({}),
        header({"lm_head.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        header({"lm_head.weight": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}),
        header({"lm_head.weight": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}),
        header([1, 2, 3]),
        struct.pack("<Q", 4) + b"\xff\xfe{}",
    ],
    ids=["2^63 long", "100 MB long", "empty", "huge", "backwards", "no dtype", "list", "no text"],
)
def test_an_absurd_header(llama, head):
    (llama / "model.safetensors").write_bytes(head + bytes(64))
    assert "m0: cannot read weights" in refusal(config_of(llama))


def test_no_weights(llama):
    (llama / "model.safetensors").unlink()
    assert "no weights" in refusal(config_of(llama))


@pytest.mark.parametrize("keep", [0, 4, 1000, 20000])
def test_truncated_weights(llama, keep):
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "m0: cannot read weights" in refusal(config_of(llama))


def test_missing_tensor(llama):
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    message = refusal(config_of(llama))
    assert "missing" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("cut", [lambda weight: weight[:-1], lambda weight: weight.flatten()])
def test_a_tensor_of_another_shape(llama, name, cut):
    weights = load_file(llama / "model.safetensors")
    weights[name] = cut(weights[name]).clone()
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    message = refusal(config_of(llama))
    assert "m0" in message
    assert name in message


def test_wrong_shapes(llama):
    edit_json(llama / "config.json", intermediate_size=48)
    message = refusal(config_of(llama))
    assert "m0" in message
    assert "weights" in message or "mismatched" in message


def test_unknown_device(llama):
    assert "device 'moon'" in refusal(config_of(llama, device="moon"))


def test_too_little_memory(llama):
    message = refusal(config_of(llama, engine={"kv_memory": "64KiB"}))
    assert "one sequence of 512 tokens" in message
    assert "engine.max_length" in message
    loaded = load_models(config_of(llama, engine={"kv_memory": "64KiB", "max_length": 128}))
    assert loaded.runners[0].num_pages * 16 * 256 <= 64 << 10


def test_scores_are_counted_as_they_are_kept(llama, monkeypatch):
    """What pages are left is what the engine's own store of scores leaves."""
    counted = []
    left_by = memory.left_by_scores

    def noted(needs, num_rows, free):
        counted.append((num_rows, [need.row_bytes for need in needs]))
        return left_by(needs, num_rows, free)

    monkeypatch.setattr(loader, "left_by_scores", noted)
    (llama / "shortlist.json").write_text(json.dumps(list(range(8))))
    config = config_of(llama, llama)
    runners = load_models(config).runners
    assert all(runner.deferred is not None for runner in runners)
    engine = Engine(runners, DigitDecoder(), frozenset(), EngineLimits.of(config, runners))
    store = engine._advancer._store
    row_bytes = [rows[0].nbytes for rows in (*store._rows, *store._states)]
    assert counted == [(store.num_rows, row_bytes)]


def test_steps_are_padded_up_to_a_draft_and_what_scores_it(llama):
    config = config_of(llama, llama, engine={"cuda_graphs": "static", "cpu_kernels": "off"})
    decoding = config.decoding.model_copy(update={"gamma": 6, "max_gamma": 8})
    runner, _ = load_models(config.model_copy(update={"decoding": decoding})).runners
    assert isinstance(runner, GraphRunner)
    assert runner._shapes.longest == 8 + 2
    assert 6 + 1 in runner._shapes.lengths[0], "scoring a whole proposal is not padded"


def test_half_batches_want_several_gpus(llama):
    message = refusal(config_of(llama, engine={"half_batches": "on"}))
    assert "engine.half_batches is on" in message


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", "does not let this server provide its attention"),
        ("mamba", "layers of type"),
    ],
)
def test_unsupported_architecture(tmp_path, family, reason):
    assert reason in refusal(config_of(make_model_dir(tmp_path / family, family)))


def test_gguf(tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    loaded = load_models(config_of(path))
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert tokenizer.eos_token_id in loaded.eos_token_ids
    ids = tokenizer.encode("the return of été")
    assert loaded.tokenizer.encode("the return of été") == ids
    ours = loaded.runners[0].forward(Batch((Span([3, 1], 0, ids, len(ids)),)))
    with torch.inference_mode():
        plain = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


def test_gguf_takes_the_tokenizer_beside_it(tmp_path, llama):
    tokenizer = make_tokenizer()
    path = write_gguf(tmp_path / "tiny.gguf", make_model(), tokenizer)
    tokenizer.add_tokens(["<beside>"])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / file, tmp_path / file)
    edit_json(tmp_path / "tokenizer_config.json", pad_token=None)
    assert load_models(config_of(path)).tokenizer.pad_token is None


def test_broken_gguf(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    assert "m0: cannot read" in refusal(config_of(path))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_weights_from_sixteen_bits_are_packed(llama, dtype):
    weights = load_file(llama / "model.safetensors")
    halved = {name: weight.bfloat16().half().float() for name, weight in weights.items()}
    save_file(halved, llama / "model.safetensors", metadata={"format": "pt"})
    lines: list[str] = []
    [runner] = load_models(config_of(llama, dtype=dtype), lines.append).runners
    held = [each.numel() * (2 if each.ndim == 2 else 4) for each in weights.values()]
    assert sum(held) <= runner.weight_bytes <= sum(held) + 1024, "buffers besides"
    assert "m0: 100% of linear weights kept in 16 bits" in lines


def test_weights_that_a_model_wants_to_see_are_not_packed(llama, monkeypatch):
    def pack(model, kernels):
        del model.lm_head.weight
        raise AttributeError("'PackedLinear' object has no attribute 'weight'")

    monkeypatch.setattr(member, "is_llama_shaped", lambda model: False)
    monkeypatch.setattr(member, "pack_weights", pack)
    lines: list[str] = []
    [runner] = load_models(config_of(llama), lines.append).runners
    assert any("m0: running with its weights as they are: 'PackedLinear'" in x for x in lines)
    assert runner.forward(Batch((Span([1], 0, [5], 1),))).isfinite().all()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("cpu_kernels", ["off", "auto"])
@pytest.mark.parametrize("has_instructions", [False, pytest.param(True, marks=needs_bfloat16)])
def test_bfloat16_on_a_cpu(llama, monkeypatch, has_instructions, cpu_kernels, fast):
    for module in (member, llama_body):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda: has_instructions)
    exact = load_models(config_of(llama, dtype="float32")).runners[0]
    lines: list[str] = []
    config = config_of(llama, dtype="bfloat16", engine={"cpu_kernels": cpu_kernels})
    [runner] = load_models(config, lines.append, fast).runners
    assert ("m0: 100% of linear weights multiplied as bfloat16" in lines) == has_instructions
    for tokens in ([5], [5, 9, 31, 7, 7, 2, 30, 11, 4, 1]):
        batch = Batch((Span([1, 2, 3], 0, tokens, len(tokens)),))
        logits = runner.forward(batch)
        assert logits.dtype == torch.bfloat16
        assert self_check.difference(logits, exact.forward(batch)) < 0.1
    assert runner.store.slots(0)[0].dtype == torch.bfloat16
    weights = load_file(llama / "model.safetensors").items()
    kernels = cpu_kernels == "auto" and support.missing() is None
    twice = has_instructions and not (kernels and multiplies_in_kernels(torch.bfloat16))
    copies = {name: 2 if twice and is_linear(name) else 1 for name, _ in weights}
    held = sum(2 * copies[name] * weight.numel() for name, weight in weights)
    assert held <= runner.weight_bytes <= held + 1024, "buffers besides"


def is_linear(name):
    return "proj" in name or "lm_head" in name

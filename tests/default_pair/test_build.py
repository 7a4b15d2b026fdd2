"""Assembling the model directories, on a tiny expert that stands in for the GGUF file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.default_pair import build, gguf_source
from server.default_pair.__main__ import main
from tests.support.tiny_models import make_model, make_tokenizer

LAYERS = (0, 3)


@pytest.fixture
def expert():
    tokenizer = make_tokenizer()
    model = make_model(num_hidden_layers=4, tie_word_embeddings=True)
    state = {n: w.clone() for n, w in model.state_dict().items() if n != "lm_head.weight"}
    return build.Model(model.config, state, tokenizer)


@pytest.fixture
def layers_file(expert, tmp_path):
    _, state = build.take_layers(expert.config, expert.state, LAYERS)
    trained = {n: w + 0.5 for n, w in state.items() if "embed" not in n}
    save_file(trained, tmp_path / "layers.safetensors")
    return tmp_path / "layers.safetensors"


@pytest.fixture
def source(expert, layers_file, monkeypatch):
    """Stands in for the GGUF file; counts how often it's opened."""

    class Source:
        opened = 0
        num_tensors = len(expert.state)

        def __init__(self, path):
            Source.opened += 1

        def config(self):
            return expert.config

        def state_dict(self, on_tensor):
            return expert.state

        def tokenizer(self):
            return expert.tokenizer

    monkeypatch.setattr(build, "GgufSource", Source)
    monkeypatch.setattr(build, "find_gguf", lambda: "tiny.gguf")
    monkeypatch.setattr(build, "package_version", lambda: "1.0")
    monkeypatch.setattr(build, "PROPOSER_LAYERS_FILE", layers_file)
    return Source


def test_take_layers_renumbers(expert):
    config, state = build.take_layers(expert.config, expert.state, LAYERS)
    assert config.num_hidden_layers == 2
    assert expert.config.num_hidden_layers == 4
    name = "mlp.up_proj.weight"
    torch.testing.assert_close(
        state[f"model.layers.1.{name}"], expert.state[f"model.layers.3.{name}"]
    )
    assert max(map(build.layer_index, state)) == 1


def test_directories_load_with_transformers(source, expert, layers_file, tmp_path):
    written = build.build_pair(tmp_path / "models")
    assert [path.name for path in written] == [build.EXPERT_NAME, build.PROPOSER_NAME]
    for path, count in zip(written, (4, 2), strict=True):
        model = AutoModelForCausalLM.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert model.config.num_hidden_layers == count
        assert model.dtype == build.STORED_DTYPE
        assert model.generation_config.eos_token_id == expert.config.eos_token_id
        assert tokenizer("the data")["input_ids"] == expert.tokenizer("the data")["input_ids"]
        assert tokenizer.chat_template == expert.tokenizer.chat_template
        torch.testing.assert_close(
            model.state_dict()["lm_head.weight"],
            expert.state["model.embed_tokens.weight"].half(),
        )
    trained = load_file(layers_file)
    torch.testing.assert_close(
        model.state_dict()["model.norm.weight"], trained["model.norm.weight"].half()
    )


def test_the_first_layers_may_be_the_experts_own(expert, layers_file):
    """Two frozen layers in front of one that is stored as the third."""
    state = {n.replace("layers.0.", "layers.2."): w for n, w in load_file(layers_file).items()}
    stored = {n: w for n, w in state.items() if "layers.1." not in n}
    save_file(stored, layers_file, metadata={build.FROZEN: "2"})
    made = build.make_proposer(expert, layers_file)
    assert made.config.num_hidden_layers == 3
    name = "self_attn.q_proj.weight"
    for layer in (0, 1):
        own = expert.state[f"model.layers.{layer}.{name}"]
        torch.testing.assert_close(made.state[f"model.layers.{layer}.{name}"], own)
    torch.testing.assert_close(
        made.state[f"model.layers.2.{name}"], stored[f"model.layers.2.{name}"]
    )
    assert max(map(build.layer_index, made.state)) == 2


def test_the_shortlist_lies_beside_the_proposer(source, tmp_path):
    build.build_pair(tmp_path)
    listed = json.loads((tmp_path / build.PROPOSER_NAME / "shortlist.json").read_text())
    assert len(set(listed)) == len(listed) > 1000
    assert max(listed) < 49_152
    assert not (tmp_path / build.EXPERT_NAME / "shortlist.json").exists()


def test_a_second_build_does_nothing(source, tmp_path):
    assert len(build.build_pair(tmp_path)) == 2
    assert build.build_pair(tmp_path) == []
    assert source.opened == 1
    assert len(build.build_pair(tmp_path, force=True)) == 2


def test_only_the_outdated_directory_is_rebuilt(source, layers_file, tmp_path):
    build.build_pair(tmp_path)
    trained = {name: weight + 1 for name, weight in load_file(layers_file).items()}
    save_file(trained, layers_file)
    assert build.build_pair(tmp_path) == [tmp_path / build.PROPOSER_NAME]


def test_a_failed_build_leaves_the_old_directory(source, tmp_path, monkeypatch):
    build.build_pair(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(build, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        build.build_pair(tmp_path, force=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert json.loads((tmp_path / build.EXPERT_NAME / build.STAMP_FILE).read_text())


def test_progress_counts_every_step(source, expert, tmp_path):
    steps: list[int] = []
    totals: list[int] = []
    build.build_pair(tmp_path, progress=build.Progress(totals.append, lambda: steps.append(1)))
    assert totals == [len(expert.state) + 2]
    assert len(steps) == 2  # the stand-in reads no tensors


def test_missing_package_is_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gguf_source, "PACKAGE", "no-such-package")
    assert main(["--out", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "no-such-package is not installed; run: pip install" in lines[0]


@pytest.mark.parametrize(
    ("gguf_name", "name"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_names(gguf_name, name):
    assert gguf_source.transformers_name(gguf_name) == name


def test_rope_permutation_is_undone():
    heads, size, hidden = 2, 8, 3
    weight = torch.arange(heads * size * hidden).view(heads * size, hidden)
    # What llama.cpp's converter does.
    permuted = weight.view(heads, 2, size // 2, hidden).swapaxes(1, 2).reshape(weight.shape)
    torch.testing.assert_close(gguf_source.undo_rope_permutation(permuted, heads), weight)

"""Synthetic members are ordinary directories, as alike as the noise says; their configs load."""

import re

import torch
from transformers import AutoModelForCausalLM

from scripts.equal_members import main
from server.config_file import load_config
from server.runner.loader import load_models
from tests.support.tiny_models import make_model_dir


def test_variants_load_beside_the_original(tmp_path, capsys, monkeypatch):
    source = make_model_dir(tmp_path / "original", initializer_range=0.1)
    monkeypatch.setattr("scripts.equal_members.BUNDLED", ("mmlu",))
    out = tmp_path / "members"
    main(["--model", str(source), "--out", str(out), "--prompts", "1", "--noise", "0.2"])
    shown = capsys.readouterr().out
    betas = [float(text) for text in re.findall(r"beta ([\d.]+)", shown)]
    assert len(betas) == 3
    assert all(0.5 < beta < 0.99 for beta in betas)
    first, second, again = (
        AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32).state_dict()
        for name in ("variant-1", "variant-2", "variant-1")
    )
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(first[name], second[name])
    assert torch.equal(first[name], again[name])
    assert torch.equal(first[name], first[name].bfloat16().float())
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    assert torch.equal(first["lm_head.weight"], original["lm_head.weight"].bfloat16().float())
    for stem, count in (("two", 2), ("three", 3)):
        config = load_config(out / f"{stem}.yaml", ["engine.max_sequences=1"])
        assert len(load_models(config).runners) == count

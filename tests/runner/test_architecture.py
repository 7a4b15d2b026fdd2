"""Architectures are refused by what their config says; rope that follows the batch is pinned."""

import pytest
import torch
from transformers import AutoConfig

from server.cache.kv_store import KVStore
from server.errors import ConfigError
from server.runner.architecture import check_architecture, native_max_length, pin_rope
from server.runner.base import Batch, Span
from server.runner.torch_runner import TorchRunner
from tests.support.tiny_models import VOCAB_SIZE, make_model

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("model_type", "reason", "settings"),
    [
        ("t5", "encoder-decoder", {}),
        ("mamba", "layers of type", {}),
        ("lfm2", "layers of type conv", {"layer_types": ["conv"], "num_hidden_layers": 1}),
        ("llama4_text", "layers of type chunked_attention", {}),
        ("qwen3_next", "layers of type linear_attention", {}),
    ],
)
def test_refused_by_config(model_type, reason, settings):
    with pytest.raises(ConfigError, match=reason):
        check_architecture("m", AutoConfig.for_model(model_type, **settings))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "qwen2", "gpt_oss"])
def test_supported_by_config(model_type):
    check_architecture("m", AutoConfig.for_model(model_type))


def test_learned_positions_cap_the_length():
    assert native_max_length("m", AutoConfig.for_model("gpt2", n_positions=77)) == 77


def test_length_must_be_known():
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        native_max_length("m", AutoConfig.for_model("bloom"))


@pytest.mark.parametrize(
    ("family", "rope", "max_length", "seen"),
    [("phi3", LONGROPE, 64, 40), ("phi3", LONGROPE, 12, 12), ("llama", DYNAMIC, 64, 64)],
)
def test_pinned_rope_is_that_of_the_longest_sequence(family, rope, max_length, seen):
    """A short text beside a long one gets what a long one alone gets from plain transformers."""
    settings = {"rope_parameters": rope, "max_position_embeddings": 64}
    plain, model = (make_model(family, **settings) for _ in range(2))
    plain.set_attn_implementation("eager")
    text = list(range(30, 30 + seen))
    with torch.inference_mode():
        expected = plain(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    pin_rope("m", model, max_length)
    runner = TorchRunner("m", model, VOCAB_SIZE, max_length, KVStore(40, 4))
    tables = (list(range(1, 17)), list(range(17, 33)))
    spans = (Span(tables[0], 0, text[:5], 5), Span(tables[1], 0, text, len(text)))
    for batch, wanted in (
        (spans, torch.cat([expected[:5], expected])),
        (spans[:1], expected[:5]),
    ):
        ours = runner.forward(Batch(tuple(batch)))
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)

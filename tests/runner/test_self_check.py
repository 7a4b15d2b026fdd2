"""The self-check passes what is right and refuses what would be silently wrong."""

import pytest
import torch

from server.cache.kv_store import KVStore
from server.errors import ConfigError
from server.runner import self_check
from server.runner.torch_runner import TorchRunner
from tests.support.tiny_models import VOCAB_SIZE, make_model


def runner_and_reference(model):
    reference = self_check.reference_logits(model, VOCAB_SIZE)
    store = KVStore(self_check.NUM_PAGES, self_check.PAGE_SIZE)
    return TorchRunner("tiny", model, VOCAB_SIZE, 64, store), reference


TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "opt"])
def test_passes_what_is_right(family, dtype):
    self_check.self_check(*runner_and_reference(make_model(family).to(dtype)))


def test_refuses_recurrent_state():
    """Mamba runs packed without an error; no config check is asked here."""
    runner, reference = runner_and_reference(make_model("mamba"))
    with pytest.raises(ConfigError, match="mamba does not let this server provide its attention"):
        self_check.self_check(runner, reference)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 0.02), (torch.float16, 0.5), (torch.bfloat16, 2.0)]
)
def test_refuses_state_that_crosses_sequences(dtype, share):
    """A model that mixes neighbouring rows is right for one sequence and wrong when packed."""
    model = make_model("llama").to(dtype)
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + share * torch.roll(x, 1, dims=1) * (x.shape[1] > 1)
    runner, reference = runner_and_reference(model)
    with pytest.raises(ConfigError, match="llama .* gives wrong logits over paged KV"):
        self_check.self_check(runner, reference)


def test_refuses_what_is_not_finite():
    model = make_model("llama")
    runner, reference = runner_and_reference(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="relative difference nan"):
        self_check.self_check(runner, reference)


def test_one_row_counts():
    plain = torch.randn(9, 50)
    ours = plain + 1e-5
    assert 0 < self_check.difference(ours, plain) < 1e-4
    ours[4] = ours[4].roll(1)
    assert self_check.difference(ours, plain) > 1
    ours[4, 3] = float("nan")
    assert not self_check.difference(ours, plain) <= 1e9


def test_what_rows_have_in_common_hides_nothing():
    plain = torch.randn(9, 50)
    ours = plain.clone()
    ours[4] = ours[4].roll(1)
    assert self_check.difference(ours + 1000, plain + 1000) > 1
    assert self_check.difference(plain + 1000, plain) < 1e-3

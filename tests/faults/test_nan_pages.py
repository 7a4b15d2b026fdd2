"""KV that is not finite: the next owners of its pages must not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from server.config_file import parse_config
from server.core.combination import Combination
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.runner.loader import LoadedModels, load_models
from tests.support.engines import generated, make_decoding, run
from tests.support.tiny_models import make_model_dir, make_triple

PROMPT = list(range(40, 57))  # four full pages
DECODING = make_decoding("cos", Combination.weighted([0.2, 0.4, 0.4]), gamma=2)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ...]]:
    """Models of the forward that is written out, and of transformers' own."""
    folder = tmp_path_factory.mktemp("models")
    own = tuple(make_model_dir(folder / f"gemma{k}", "gemma2", seed=k) for k in range(3))
    return {"llama": make_triple(folder), "gemma2": own}


def load(directories: tuple[Path, ...], **engine: Any) -> LoadedModels:
    settings = {"kv_memory": "256KiB", "max_length": 64, "page_size": 4, **engine}
    return load_models(
        parse_config(
            {
                "served_model_name": "tiny",
                "models": [{"name": f"m{k}", "path": str(d)} for k, d in enumerate(directories)],
                "combination": {"method": "weighted", "weights": [0.2, 0.4, 0.4]},
                "engine": {"max_sequences": 4, **settings},
            }
        )
    )


def make_engine(models: LoadedModels) -> Engine:
    return Engine(
        models.runners,
        models.tokenizer.backend_tokenizer,
        models.eos_token_ids,
        EngineLimits(max_sequences=4, max_step_tokens=16),
    )


def start(name: str, prompt: list[int], **params: Any) -> Sequence:
    settings = {"max_tokens": 16, "seed": 3, "ignore_eos": True, **params}
    return Sequence.start(name, prompt, SamplingParams(**settings), DECODING)


def others() -> list[Sequence]:
    return [start(f"s{i}", [i + 1] * (2 + 5 * i)) for i in range(3)]


def spoil(models: LoadedModels, pages: list[list[int]] | None = None) -> None:
    """Write NaN over these pages of each model, over all that may be owned if not given."""
    with torch.inference_mode():
        for k, runner in enumerate(models.runners):
            size = runner.page_size
            chosen = range(1, runner.num_pages) if pages is None else pages[k]
            for layer in range(runner.store.num_layers):
                for memory in runner.store.slots(layer):
                    for page in chosen:
                        memory[page * size : (page + 1) * size] = torch.nan


@pytest.mark.parametrize("padding", ["off", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_pages_that_hold_nan_serve_others_unharmed(
    families: dict[str, tuple[Path, ...]], family: str, padding: str
) -> None:
    models = load(families[family], cuda_graphs=padding)
    expected = run(make_engine(models), others())
    spoil(models)
    deltas = run(make_engine(models), others())
    for name, each in deltas.items():
        assert each[-1].finish_reason == "length"
        assert generated(each) == generated(expected[name])


@pytest.mark.parametrize("padding", ["off", "static"])
def test_kv_that_turns_nan_costs_one_sequence_only(
    families: dict[str, tuple[Path, ...]], padding: str
) -> None:
    """Beside it and after it others are served, one of them with its prompt."""
    models = load(families["llama"], cuda_graphs=padding)
    expected = run(make_engine(models), [start("bad", PROMPT), *others()])
    engine = make_engine(models)
    bad, beside = start("bad", PROMPT), others()
    for sequence in (bad, *beside):
        engine.add(sequence)
    while min(bad.num_seen) < len(PROMPT):
        engine.step()
    spoil(models, [list(table.pages[:4]) for table in engine.scheduler.pages._tables["bad"]])
    found = {s.id: s.token_ids[s.num_prompt : s.num_verified] for s in (bad, *beside)}
    errors = {}
    while engine.has_work:
        for delta in engine.step():
            found[delta.sequence_id] += delta.token_ids
            errors[delta.sequence_id] = delta.error
    assert "returned NaN" in (errors["bad"] or "")
    for sequence in beside:
        assert errors[sequence.id] is None
        assert tuple(found[sequence.id]) == generated(expected[sequence.id])
    engine.scheduler.check_integrity()
    # Its prompt was published before anybody knew.
    again = run(engine, [start("bad", PROMPT)])["bad"]
    assert again[-1].stats is not None
    assert again[-1].stats.cached == [0, 0, 0]
    assert generated(again) == generated(expected["bad"])

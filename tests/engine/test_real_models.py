"""The engine over real transformers models: float32, CPU, random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.config_file import parse_config
from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.runner.loader import LoadedModels, load_models
from tests.support.engines import generated, make_decoding, run
from tests.support.threads import threads
from tests.support.tiny_models import make_triple

PROMPTS = [[5, 9, 200, 31], [7] * 23, [100, 3], list(range(40, 55))]
COMBINATIONS = {
    "weighted": Combination.weighted([0.2, 0.4, 0.4]),
    "contrastive": Combination.contrastive(3, 0.2),
    "linear": Combination.linear([0.3, -0.1, 0.8]),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return make_triple(tmp_path_factory.mktemp("models"))


def load(directories: tuple[Path, ...], kv_memory: str = "16MiB") -> LoadedModels:
    return load_models(
        parse_config(
            {
                "served_model_name": "tiny",
                "models": [{"name": f"m{k}", "path": str(d)} for k, d in enumerate(directories)],
                "combination": {"method": "weighted", "weights": [0.2, 0.4, 0.4]},
                "engine": {"kv_memory": kv_memory, "max_length": 96, "page_size": 4},
            }
        )
    )


@pytest.fixture(scope="module")
def models(directories: tuple[Path, ...]) -> LoadedModels:
    return load(directories)


def make_engine(
    models: LoadedModels, steps: list[StepStats] | None = None, prefix_cache: bool = True
) -> Engine:
    return Engine(
        models.runners,
        models.tokenizer.backend_tokenizer,
        models.eos_token_ids,
        EngineLimits(max_step_tokens=32, prefix_cache=prefix_cache),
        on_step=steps.append if steps is not None else None,
    )


def sequences_of(decoding: DecodingParams, temperature: float) -> list[Sequence]:
    return [
        Sequence.start(
            f"s{i}",
            prompt,
            SamplingParams(max_tokens=40, temperature=temperature, seed=i, ignore_eos=True),
            decoding,
        )
        for i, prompt in enumerate(PROMPTS * 4)
    ]


def texts(engine: Engine, sequences: list[Sequence]) -> list[tuple[int, ...]]:
    deltas = run(engine, sequences)
    engine.scheduler.check_integrity()
    return [generated(deltas[sequence.id]) for sequence in sequences]


def transformers_greedy(
    directories: tuple[Path, ...], combination: Combination, prompt: list[int], count: int
) -> tuple[int, ...]:
    """The combined argmax by plain full forwards, no cache and none of the product's code."""
    members = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in directories]
    made: list[int] = []
    for _ in range(count):
        ids = torch.tensor([[*prompt, *made]])
        with torch.inference_mode():
            rows = [member(ids).logits[0, -1] for member in members]
        if combination.method == "weighted":
            rows = [row.softmax(-1) for row in rows]
        mix = sum(w * row for w, row in zip(combination.weights, rows, strict=True))
        assert isinstance(mix, torch.Tensor)
        made.append(int(mix.argmax()))
    return tuple(made)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_greedy_output_is_that_of_standard_and_of_transformers(
    name: str, directories: tuple[Path, ...], models: LoadedModels
) -> None:
    combination = COMBINATIONS[name]
    standard = texts(make_engine(models), sequences_of(make_decoding("standard", combination), 0.0))
    assert standard[0] == transformers_greedy(directories, combination, PROMPTS[0], 40)
    for strategy, gamma in (("speculative", 5), ("cos", 1), ("cos", 4), ("cos", (3, 2, 2))):
        decoding = make_decoding(strategy, combination, gamma)
        steps: list[StepStats] = []
        assert texts(make_engine(models, steps), sequences_of(decoding, 0.0)) == standard
        assert sum(step.num_proposed for step in steps) > 0


@pytest.mark.parametrize("strategy", ["standard", "cos", "mixture"])
def test_seeded_text_is_the_same_alone_in_a_batch_and_across_preemption(
    strategy: str, directories: tuple[Path, ...], models: LoadedModels
) -> None:
    decoding = make_decoding(strategy, COMBINATIONS["weighted"], gamma=3, kappa=1)
    alone = [texts(make_engine(models), [s])[0] for s in sequences_of(decoding, 1.0)]
    assert texts(make_engine(models), sequences_of(decoding, 1.0)) == alone
    steps: list[StepStats] = []
    small = load(directories, kv_memory="300KiB")
    assert texts(make_engine(small, steps), sequences_of(decoding, 1.0)) == alone
    assert sum(step.num_preempted for step in steps) > 0


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("strategy", ["standard", "cos"])
def test_the_number_of_threads_changes_nothing(
    strategy: str, count: int, models: LoadedModels
) -> None:
    """Few texts on more threads among them, and requests of every kind beside each other."""
    decoding = make_decoding(strategy, COMBINATIONS["contrastive"], gamma=3)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_p": 0.9, "min_p": 0.01},
        {"is_seeded": True, "top_k": 20},
        {"frequency_penalty": 0.5},
    ]

    def written(num_texts: int) -> list[tuple[int, ...]]:
        sequences = sequences_of(decoding, 1.0)[:num_texts]
        for sequence, kind in zip(sequences, kinds * 3, strict=False):
            sequence.params = replace(sequence.params, **kind)
        return texts(make_engine(models), sequences)

    for num_texts in (2, 3, 9):
        alone = written(num_texts)
        with threads(count):
            assert written(num_texts) == alone


@pytest.mark.parametrize("strategy", ["standard", "speculative", "cos"])
def test_greedy_text_over_found_prefixes_is_that_of_a_full_read(
    strategy: str, directories: tuple[Path, ...], models: LoadedModels
) -> None:
    """Three turns of two chats with one system prompt, prefixes found and all read anew."""
    decoding = make_decoding(strategy, COMBINATIONS["contrastive"], gamma=3)
    steps: list[StepStats] = []
    cached, plain = make_engine(models, steps), make_engine(load(directories), prefix_cache=False)
    params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    prompts = [[*range(40, 59), chat] for chat in (7, 9)]
    for turn in range(3):
        for chat, prompt in enumerate(prompts):
            ids = f"{turn}-{chat}"
            [found] = texts(cached, [Sequence.start(ids, prompt, params, decoding)])
            [read] = texts(plain, [Sequence.start(ids, prompt, params, decoding)])
            assert found == read
            prompt += [*found, 3, 200 + turn]
    for model in decoding.combination.scorers:
        assert sum(step.num_cached[model] for step in steps) > 100


def test_prompt_log_probabilities_are_those_of_transformers(
    directories: tuple[Path, ...], models: LoadedModels
) -> None:
    members = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in directories]
    decoding = make_decoding("cos", COMBINATIONS["weighted"], gamma=3)
    params = SamplingParams(max_tokens=4, prompt_logprobs=2)
    prompts = [list(range(30, 90)), *PROMPTS]
    sequences = [Sequence.start(f"s{i}", p, params, decoding) for i, p in enumerate(prompts)]
    deltas = run(make_engine(models), sequences)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            rows = [member(ids).logits[0, :-1].softmax(-1) for member in members]
        mix = torch.stack([w * row for w, row in zip((0.2, 0.4, 0.4), rows, strict=True)]).sum(0)
        expected = mix.log().gather(1, ids[0, 1:, None])[:, 0]
        entries = deltas[sequence.id][0].prompt_logprobs
        assert [entry.logprob for entry in entries] == pytest.approx(expected.tolist(), abs=1e-4)
        best = mix.log().topk(2).values
        tops = [[p for _, p in entry.top] for entry in entries]
        assert torch.allclose(torch.tensor(tops), best, atol=1e-4)

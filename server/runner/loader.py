"""Loads the members: read, check, compare vocabularies, size the KV memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from server.cache.kv_store import KVStore
from server.config import ModelConfig, ServerConfig
from server.errors import ConfigError
from server.runner import self_check
from server.runner.architecture import check_architecture, native_max_length, pin_rope
from server.runner.memory import KvNeed, free_bytes, num_pages
from server.runner.packed_linear import pack_linears
from server.runner.source import ModelSource
from server.runner.torch_runner import TorchRunner
from server.runner.vocabulary import end_of_text_ids, shared_vocab_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModels:
    """Everything the engine and the HTTP surface need of the models.

    Attributes:
        runners: of the members, in the configured order.
        tokenizer: of the last member, the expert, with its chat template.
        eos_token_ids: tokens that end a text: what the expert's generation config, config and
            tokenizer call end of sequence. Other members have no say.
        max_length: strictest of the members' context lengths and engine.max_length, in tokens.
        vocab_size: of the shared vocabulary.
    """

    runners: tuple[TorchRunner, ...]
    tokenizer: PreTrainedTokenizerFast
    eos_token_ids: frozenset[int]
    max_length: int
    vocab_size: int


def load_models(
    config: ServerConfig, on_progress: Callable[[str], None] | None = None
) -> LoadedModels:
    """Load all members of `config`.

    Args:
        config: the whole configuration; models and engine are read.
        on_progress: called with one line at each phase, besides the log.

    Raises:
        ConfigError: anything wrong with a path, a file, the pair or the machine; one clear line.
    """
    report = _Reporter(on_progress)
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    sources = [ModelSource(member) for member in config.models]
    configs = [source.config() for source in sources]
    for source, model_config in zip(sources, configs, strict=True):
        check_architecture(source.name, model_config)
    max_length = _max_length(sources, configs, config.engine.max_length)
    tokenizer, vocab_size = _shared_vocabulary(sources, report)
    runners = tuple(
        _load_runner(source, member, max_length, vocab_size, report)
        for source, member in zip(sources, config.models, strict=True)
    )
    _allocate(runners, config, max_length, report)
    generation = sources[-1].generation_config()
    eos = end_of_text_ids(
        vocab_size,
        generation.eos_token_id if generation else None,
        configs[-1].eos_token_id,
        tokenizer.eos_token_id,
    )
    return LoadedModels(runners, tokenizer, eos, max_length, vocab_size)


class _Reporter:
    """Logs one line for each phase."""

    def __init__(self, on_progress: Callable[[str], None] | None) -> None:
        self._on_progress = on_progress

    def __call__(self, message: str) -> None:
        logger.info("%s", message)
        if self._on_progress is not None:
            self._on_progress(message)


def _max_length(
    sources: Sequence[ModelSource], configs: Sequence[PreTrainedConfig], wanted: int | None
) -> int:
    native = {
        source.name: native_max_length(source.name, config)
        for source, config in zip(sources, configs, strict=True)
    }
    shortest = min(native, key=lambda name: native[name])
    if wanted is not None and wanted > native[shortest]:
        raise ConfigError(
            f"engine.max_length is {wanted}, but model {shortest} takes at most {native[shortest]}"
        )
    return wanted or native[shortest]


def _shared_vocabulary(
    sources: Sequence[ModelSource], report: _Reporter
) -> tuple[PreTrainedTokenizerFast, int]:
    tokenizers = [source.tokenizer() for source in sources]
    names = [source.name for source in sources]
    size = shared_vocab_size(names, [tokenizer.get_vocab() for tokenizer in tokenizers])
    report(f"vocabulary: {size} tokens, shared by {', '.join(names)}")
    return tokenizers[-1], size


def _load_runner(
    source: ModelSource, member: ModelConfig, max_length: int, vocab_size: int, report: _Reporter
) -> TorchRunner:
    device = _device(member)
    dtype = _dtype(member, device)
    report(f"{member.name}: loading {member.path}")
    started = time.perf_counter()
    model = source.model(dtype, device)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise ConfigError(
            f"model {member.name}: {rows} embedding rows for a tokenizer of {vocab_size} tokens"
        )
    report(
        f"{member.name}: {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{str(dtype).removeprefix('torch.')} on {device}, {time.perf_counter() - started:.1f} s"
    )
    started = time.perf_counter()
    pin_rope(member.name, model, max_length)
    reference = self_check.reference_logits(model, vocab_size)
    if member.dtype == "auto" and device.type == "cpu":
        packed, considered = pack_linears(model)
        report(
            f"{member.name}: {packed / max(1, considered):.0%} of linear weights kept in 16 bits"
        )
    store = KVStore(self_check.NUM_PAGES, self_check.PAGE_SIZE)
    runner = TorchRunner(member.name, model, vocab_size, max_length, store)
    self_check.self_check(runner, reference)
    report(f"{member.name}: self-check passed, {time.perf_counter() - started:.1f} s")
    return runner


def _device(member: ModelConfig) -> torch.device:
    if member.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(member.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"model {member.name}: device {member.device!r}: {reason}") from error
    return device


def _dtype(member: ModelConfig, device: torch.device) -> torch.dtype:
    automatic = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, automatic if member.dtype == "auto" else member.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _allocate(
    runners: Sequence[TorchRunner], config: ServerConfig, max_length: int, report: _Reporter
) -> None:
    """Exchange the self-check's little stores for the real ones."""
    needs = [KvNeed(runner.device, runner.store.bytes_per_token) for runner in runners]
    free = {need.device: free_bytes(need.device) for need in needs}
    pages = num_pages(needs, config.engine, max_length, free)
    for runner in runners:
        runner.store = runner.store.resized(pages, config.engine.page_size)
    tokens = (pages - 1) * config.engine.page_size
    size = sum(need.bytes_per_token for need in needs) * pages * config.engine.page_size
    report(f"KV memory: {tokens} tokens a model, {size / (1 << 20):.0f} MiB in all")

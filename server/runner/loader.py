"""Loads the members: compare vocabularies, load each one, size the KV memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from server.cache.devices import device_numbers, score_devices
from server.cache.score_store import PROMPT_WINDOW, num_score_rows
from server.config import ServerConfig
from server.core.sampling_params import proposal_lengths
from server.errors import ConfigError
from server.runner import cgroup
from server.runner.architecture import check_architecture, native_max_length
from server.runner.graph_runner import GraphRunner
from server.runner.member import MemberLoader
from server.runner.memory import KvNeed, ScoreNeed, free_bytes, left_by_scores, num_pages
from server.runner.source import ModelSource
from server.runner.static_shapes import Shapes
from server.runner.torch_runner import TorchRunner
from server.runner.vocabulary import end_of_text_ids, shared_vocab_size

logger = logging.getLogger(__name__)

LoadedRunner = TorchRunner | GraphRunner


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

    runners: tuple[LoadedRunner, ...]
    tokenizer: PreTrainedTokenizerFast
    eos_token_ids: frozenset[int]
    max_length: int
    vocab_size: int


def load_models(
    config: ServerConfig,
    on_progress: Callable[[str], None] | None = None,
    fast: bool = True,
) -> LoadedModels:
    """Load all members of `config`.

    Args:
        config: the whole configuration; models and engine are read.
        on_progress: called with one line at each phase, besides the log.
        fast: use the forwards written out for some models; False: transformers' own, always.

    Raises:
        ConfigError: anything wrong with a path, a file, the pair or the machine; one clear line.
    """
    report = _Reporter(on_progress)
    torch.set_num_threads(config.engine.threads or _num_threads())
    sources = [ModelSource(member) for member in config.models]
    configs = [source.config() for source in sources]
    for source, model_config in zip(sources, configs, strict=True):
        check_architecture(source.name, model_config)
    max_length = _max_length(sources, configs, config.engine.max_length)
    tokenizer, vocab_size = _shared_vocabulary(sources, report)
    loaded = tuple(
        MemberLoader(source, member, max_length, vocab_size, report, config.engine).load(fast)
        for source, member in zip(sources, config.models, strict=True)
    )
    _check_half_batches(loaded, config)
    _allocate(loaded, config, max_length, report)
    runners = tuple(_with_graphs(runner, config, report) for runner in loaded)
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


def _num_threads() -> int:
    """As many as torch would take, but no more than a container may keep busy.

    Threads that wait for each other would wait for those that get no time.
    """
    allowed = cgroup.num_cpus()
    usual = torch.get_num_threads()
    return usual if allowed is None else min(usual, allowed)


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


def _allocate(
    runners: Sequence[TorchRunner], config: ServerConfig, max_length: int, report: _Reporter
) -> None:
    """Exchange the self-check's little stores for the real ones."""
    needs = [KvNeed(runner.device, runner.store.bytes_per_token) for runner in runners]
    free = {need.device: free_bytes(need.device) for need in needs}
    left = left_by_scores(_score_needs(runners), _num_score_rows(config), free)
    pages = num_pages(needs, config.engine, max_length, left)
    for runner in runners:
        runner.store = runner.store.resized(pages, config.engine.page_size)
    tokens = (pages - 1) * config.engine.page_size
    size = sum(need.bytes_per_token for need in needs) * pages * config.engine.page_size
    report(f"KV memory: {tokens} tokens a model, {size / (1 << 20):.0f} MiB in all")


def _score_needs(runners: Sequence[TorchRunner]) -> list[ScoreNeed]:
    """Of scores where they are kept, and of the states of models that defer them."""
    kept = score_devices([runner.device for runner in runners])
    needs = [
        ScoreNeed(device, runner.vocab_size * runner.dtype.itemsize)
        for device, runner in zip(kept, runners, strict=True)
    ]
    for runner in runners:
        if runner.deferred is not None:
            size = runner.deferred.state_size * runner.dtype.itemsize
            needs.append(ScoreNeed(runner.device, size))
    return needs


def _num_score_rows(config: ServerConfig) -> int:
    """As many as the engine's store will have."""
    engine = config.engine
    capacity = config.decoding.max_gamma + len(config.models)
    window = min(PROMPT_WINDOW, engine.max_step_tokens)
    return num_score_rows(engine.max_sequences, capacity, window)


def _check_half_batches(runners: Sequence[TorchRunner], config: ServerConfig) -> None:
    num_devices = len(set(device_numbers([runner.device for runner in runners])))
    if config.engine.half_batches == "on" and num_devices == 1:
        raise ConfigError(
            "engine.half_batches is on, but the models are not on several GPUs; see models.N.device"
        )


def _with_graphs(runner: TorchRunner, config: ServerConfig, report: _Reporter) -> LoadedRunner:
    """`runner` for steps of few tokens in padded shapes, where that is wanted and possible."""
    wanted = config.engine.cuda_graphs
    # Torch's attention would gather the longest possible text for every sequence of a graph.
    can_capture = runner.device.type == "cuda" and runner.attends_with_kernels
    if wanted == "off" or (wanted == "auto" and not can_capture):
        return runner
    longest = config.decoding.max_gamma + len(config.models)
    if can_capture:
        longest = min(longest, runner.longest_attended())
    if longest < 1:
        return runner
    graphs = GraphRunner(runner, _shapes(config, longest), capture=wanted == "auto")
    graphs.warm_up(report)
    return graphs


def _shapes(config: ServerConfig, longest: int) -> Shapes:
    """Of steps of up to `longest` tokens each; those of scoring a whole proposal are not padded."""
    gammas = proposal_lengths(config.decoding.gamma, len(config.models))
    engine = config.engine
    return Shapes.of(engine.max_sequences, longest, engine.max_step_tokens, max(gammas) + 1)

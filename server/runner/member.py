"""Loads one member: read it, make the fastest runner of it, prove that runner right."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.cache.kv_store import KVStore
from server.config import EngineConfig, ModelConfig
from server.errors import ConfigError
from server.runner import self_check
from server.runner.architecture import pin_rope
from server.runner.attention_choice import choose_attention, has_cpu_kernels
from server.runner.llama_body import LlamaBody, is_llama_shaped
from server.runner.packed_linear import PackingReport, multiplies_bfloat16, pack_weights
from server.runner.shortlist import AUTO, Shortlist, find_shortlist
from server.runner.source import ModelSource
from server.runner.torch_runner import Body, TorchRunner


class MemberLoader:
    """Makes the runner of one member, over a little store for the self-check."""

    def __init__(
        self,
        source: ModelSource,
        member: ModelConfig,
        max_length: int,
        vocab_size: int,
        report: Callable[[str], None],
        engine: EngineConfig,
    ) -> None:
        """`report` takes one line for each phase; of `engine`, attention and compile are read."""
        self._source = source
        self._name = member.name
        self._max_length = max_length
        self._vocab_size = vocab_size
        self._report = report
        self._device = _device(member)
        self._dtype = _dtype(member, self._device)
        self._shortlist = find_shortlist(member.name, member.shortlist, source.path, vocab_size)
        self._must_shorten = member.shortlist not in (None, AUTO)
        self._packs = _packs(member, self._device)
        self._has_kernels = has_cpu_kernels(engine.cpu_kernels, self._device, self._say)
        self._insists_on_cpu_kernels = engine.cpu_kernels == "on"
        self._short = choose_attention(engine.attention, self._device, self._say, self._has_kernels)
        self._insists = engine.attention == "triton"
        self._compiles = engine.compile == "layers"

    def load(self, fast: bool) -> TorchRunner:
        """A runner that passed the self-check.

        Args:
            fast: use the forward written out for models of this shape, if there is one.

        Raises:
            ConfigError: the member cannot be read, or gives wrong logits here.
        """
        model = self._read()
        started = time.perf_counter()
        reference = self_check.reference_logits(model, self._vocab_size)
        runner = None
        if fast and not (self._device.type == "cpu" and is_llama_shaped(model)):
            self._do_without_shortlist()
        if fast and is_llama_shaped(model):
            had_kernels = self._has_kernels
            runner = self._try_fast(model, reference)
            if runner is None and had_kernels:
                runner = self._try_fast(self._read(), reference)
            if runner is None:
                self._do_without_shortlist()
                model = self._read()  # the first one gave its weights away
        if runner is None:
            runner = self._load_generic(model, reference)
            if self._compiles:
                self._report(f"{self._name}: only layers of Llama-shaped models are compiled")
        self._report(f"{self._name}: self-check passed, {time.perf_counter() - started:.1f} s")
        return runner

    def _try_fast(self, model: PreTrainedModel, reference: list[Tensor]) -> TorchRunner | None:
        """None where the written-out forward gives other logits."""
        size = model.get_memory_footprint()
        # What runs in kernels is nothing that could be compiled further.
        kernels = self._has_kernels and not self._compiles
        body = LlamaBody(model, self._packs, self._shortlist, kernels, self._max_length)
        runner = self._runner(model, body, size - body.packing.saved)
        try:
            # A CPU's kernels are for attention and the rest alike: both are tried again without.
            self._check(runner, reference, replace=not self._has_kernels)
        except Exception as error:  # kernels may fail in any way
            self._fall_back(error)
            return None
        self._report_packing(body.packing)
        if self._compiles:
            self._compile(runner, body, reference)
        if self._shortlist is not None:
            runner.deferred = Shortlist(runner, body, self._shortlist)
            count, size = len(self._shortlist), self._vocab_size
            self._report(f"{self._name}: proposes from a shortlist of {count} of {size} tokens")
        return runner

    def _compile(self, runner: TorchRunner, body: LlamaBody, reference: list[Tensor]) -> None:
        """The layers, unless that fails or gives other logits."""
        started = time.perf_counter()
        try:
            body.compile_layers()
            _check_anew(runner, reference)
        except Exception as error:  # compilers fail in many ways
            body.drop_compiled()
            reason = str(error).strip().split("\n")[0]
            self._report(f"{self._name}: layers are not compiled: {reason}")
            return
        seconds = time.perf_counter() - started
        self._report(f"{self._name}: compiled its layers, {seconds:.1f} s")

    def _say(self, line: str) -> None:
        self._report(f"{self._name}: {line}")

    def _fall_back(self, error: Exception) -> None:
        """To torch's operations from kernels, and from these to the forward of transformers."""
        reason = str(error).split("\n")[0]
        if not self._has_kernels:
            if not isinstance(error, ConfigError):
                raise error
            self._say(f"falling back to the forward of transformers: {reason}")
            return
        if self._insists_on_cpu_kernels:
            message = f"model {self._name}: engine.cpu_kernels: on, but they fail here: {reason}"
            raise ConfigError(message) from error
        self._has_kernels = False
        if not self._insists:
            self._short = None
        self._say(f"falling back to torch's operations: {reason}")

    def _do_without_shortlist(self) -> None:
        if self._shortlist is None:
            return
        problem = f"model {self._name}: only Llama-shaped models on a CPU may have a shortlist"
        if self._must_shorten:
            raise ConfigError(problem)
        self._report(f"{problem}; it is not used")
        self._shortlist = None

    def _load_generic(self, model: PreTrainedModel, reference: list[Tensor]) -> TorchRunner:
        if self._packs:
            try:
                return self._load_packed(model, reference)
            except Exception as error:  # code of a model may look at its weights, in many ways
                reason = str(error).split("\n")[0]
                self._report(f"{self._name}: running with its weights as they are: {reason}")
                model = self._read()
        runner = self._runner(model, None, model.get_memory_footprint())
        self._check(runner, reference)
        return runner

    def _load_packed(self, model: PreTrainedModel, reference: list[Tensor]) -> TorchRunner:
        size = model.get_memory_footprint()
        packing = pack_weights(model, self._has_kernels)
        runner = self._runner(model, None, size - packing.saved)
        self._check(runner, reference)
        self._report_packing(packing)
        return runner

    def _check(self, runner: TorchRunner, reference: list[Tensor], replace: bool = True) -> None:
        """With the kernels; where these fail or give other logits, `replace` them by torch's."""
        try:
            self_check.self_check(runner, reference)
        except Exception as error:  # a kernel may fail to compile in any way
            if self._short is None or not replace:
                raise
            reason = str(error).split("\n")[0]
            if self._insists:
                message = f"model {self._name}: engine.attention: triton fails here: {reason}"
                raise ConfigError(message) from error
            self._report(f"{self._name}: falling back to torch's attention: {reason}")
            runner.drop_kernels()
            _check_anew(runner, reference)
        if self._has_kernels and runner.refuses:
            self._say("its layers attend in ways that the kernels do not know: torch attends")
            runner.drop_kernels()

    def _runner(self, model: PreTrainedModel, body: Body | None, weight_bytes: int) -> TorchRunner:
        store = KVStore(self_check.NUM_PAGES, self_check.PAGE_SIZE)
        return TorchRunner(
            self._name,
            model,
            self._vocab_size,
            self._max_length,
            store,
            body,
            weight_bytes,
            self._short,
        )

    def _read(self) -> PreTrainedModel:
        """The model with its rotary frequencies pinned."""
        self._report(f"{self._name}: loading {self._source.path}")
        started = time.perf_counter()
        model = self._source.model(self._dtype, self._device)
        rows = model.get_input_embeddings().weight.shape[0]
        if rows < self._vocab_size:
            raise ConfigError(
                f"model {self._name}: {rows} embedding rows for a tokenizer of "
                f"{self._vocab_size} tokens"
            )
        dtype = str(self._dtype).removeprefix("torch.")
        self._report(
            f"{self._name}: {model.num_parameters() / 1e6:.1f} M parameters, {dtype} on "
            f"{self._device}, {time.perf_counter() - started:.1f} s"
        )
        pin_rope(self._name, model, self._max_length)
        return model

    def _report_packing(self, packing: PackingReport) -> None:
        if self._packs:
            share = packing.packed / max(1, packing.considered)
            how = "kept in 16 bits" if self._dtype == torch.float32 else "multiplied as bfloat16"
            self._report(f"{self._name}: {share:.0%} of linear weights {how}")


def _check_anew(runner: TorchRunner, reference: list[Tensor]) -> None:
    runner.store = KVStore(self_check.NUM_PAGES, self_check.PAGE_SIZE)
    self_check.self_check(runner, reference)


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


def _packs(member: ModelConfig, device: torch.device) -> bool:
    """Are weights laid out for the kernels of this processor?"""
    if device.type != "cpu":
        return False
    if member.dtype == "bfloat16":
        return multiplies_bfloat16()
    return member.dtype in ("auto", "float32")


def _dtype(member: ModelConfig, device: torch.device) -> torch.dtype:
    automatic = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, automatic if member.dtype == "auto" else member.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype

"""Loads one member: read it, make the fastest runner of it, prove that runner right.

Whatever makes a forward faster may be missing on a machine, fail there, or give other logits. So
there is a ladder for each part, tried from the top; a step down is one line of the log:

    forward     written out for Llama's shape, in the CPU's kernels     `_in_kernels`
                the same in torch's operations, on any device           `_in_operations`
                transformers', its weights laid out for the CPU         `_packed`
                transformers', its weights as they are                  `_as_it_is`
    attention   kernels: Triton's, or the CPU's                         `_check_attention`
                torch's operations
    layers      compiled, where the forward is written out              `_compile`
                as they are
    few tokens  CUDA graphs                                             `GraphRunner.warm_up`
                without

Where the configuration insists on something, a ConfigError takes the place of the step down.
"""

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
    """Makes the runner of one member, once, over a little store for the self-check."""

    def __init__(
        self,
        source: ModelSource,
        member: ModelConfig,
        max_length: int,
        vocab_size: int,
        report: Callable[[str], None],
        engine: EngineConfig,
    ) -> None:
        """Chooses device, types and kernels; nothing is read but the shortlist.

        Args:
            source: where the member is read from.
            member: its section of the configuration.
            max_length: of sequences, in tokens.
            vocab_size: of the shared vocabulary.
            report: takes one line for each phase.
            engine: read for attention, cpu_kernels and compile.

        Raises:
            ConfigError: there is no such device, kernels that the configuration insists on cannot
                run here, or the shortlist cannot be read.
        """
        self._source = source
        self._name = member.name
        self._max_length = max_length
        self._vocab_size = vocab_size
        self._report = report
        self._device = _device(member)
        self._dtype = _dtype(member, self._device)
        self._shortlist = find_shortlist(member.name, member.shortlist, source.path, vocab_size)
        self._insists_on_shortlist = member.shortlist not in (None, AUTO)
        self._packs = _packs(member, self._device)
        self._has_kernels = has_cpu_kernels(engine.cpu_kernels, self._device, self._say)
        self._insists_on_kernels = engine.cpu_kernels == "on"
        self._attention = choose_attention(
            engine.attention, self._device, self._say, self._has_kernels
        )
        self._insists_on_triton = engine.attention == "triton"
        self._compiles = engine.compile == "layers"
        self._unspent: PreTrainedModel | None = None  # read, and its weights not taken over yet

    def load(self, fast: bool) -> TorchRunner:
        """A runner that passed the self-check.

        Args:
            fast: use the forward written out for models of this shape, if there is one.

        Raises:
            ConfigError: the member cannot be read, or gives wrong logits here.
        """
        self._unspent = model = self._read()
        started = time.perf_counter()
        reference = self_check.reference_logits(model, self._vocab_size)
        may_write_out = fast and is_llama_shaped(model)
        if fast and not (may_write_out and self._device.type == "cpu"):
            self._do_without_shortlist()
        del model  # or it would stay while it is read anew
        runner = None
        if may_write_out:
            runner = self._in_kernels(reference) or self._in_operations(reference)
        if runner is None:
            runner = self._packed(reference) or self._as_it_is(reference)
            if self._compiles:
                self._say("only layers of Llama-shaped models are compiled")
        self._say(f"self-check passed, {time.perf_counter() - started:.1f} s")
        return runner

    def _in_kernels(self, reference: list[Tensor]) -> TorchRunner | None:
        """Written out, in the CPU's kernels; None where there are none, or they fail."""
        if not self._has_kernels:
            return None
        runner, body = self._written_out()
        try:
            # Attention's are of the same kind as all others: the next step does without any.
            self._check(runner, reference)
        except Exception as error:  # kernels may fail in any way
            reason = _first_line(error)
            if self._insists_on_kernels:
                message = f"model {self._name}: engine.cpu_kernels: on, but they fail here: "
                raise ConfigError(message + reason) from error
            self._has_kernels = False
            if not self._insists_on_triton:
                self._attention = None
            self._say(f"falling back to torch's operations: {reason}")
            return None
        return self._finished(runner, body, reference)

    def _in_operations(self, reference: list[Tensor]) -> TorchRunner | None:
        """Written out, in torch's operations; None where that gives other logits."""
        runner, body = self._written_out()
        try:
            self._check_attention(runner, reference)
        except ConfigError as error:
            self._say(f"falling back to the forward of transformers: {_first_line(error)}")
            self._do_without_shortlist()
            return None
        return self._finished(runner, body, reference)

    def _packed(self, reference: list[Tensor]) -> TorchRunner | None:
        """The forward of transformers over packed weights; None where none are, or it fails."""
        if not self._packs:
            return None
        model = self._take_model()
        size = model.get_memory_footprint()
        try:
            packing = pack_weights(model, self._has_kernels)
            runner = self._runner(model, None, size - packing.saved)
            self._check_attention(runner, reference)
        except Exception as error:  # code of a model may look at its weights, in many ways
            self._say(f"running with its weights as they are: {_first_line(error)}")
            return None
        self._report_packing(packing)
        return runner

    def _as_it_is(self, reference: list[Tensor]) -> TorchRunner:
        """The forward of transformers, which has to give what it gives without this server."""
        model = self._take_model()
        runner = self._runner(model, None, model.get_memory_footprint())
        self._check_attention(runner, reference)
        return runner

    def _check(self, runner: TorchRunner, reference: list[Tensor]) -> None:
        """The self-check. Raises where the logits are wrong, or a kernel fails."""
        self_check.self_check(runner, reference)
        if self._has_kernels and runner.kernels_declined:
            # Spans are grouped for kernels or for torch, and for all layers alike.
            self._say("its layers attend in ways that the kernels do not know: torch attends")
            runner.drop_kernels()

    def _check_attention(self, runner: TorchRunner, reference: list[Tensor]) -> None:
        """`_check`; where kernels for attention fail or give other logits, torch attends."""
        try:
            self._check(runner, reference)
        except Exception as error:  # a kernel may fail to compile in any way
            if self._attention is None:
                raise
            reason = _first_line(error)
            if self._insists_on_triton:
                message = f"model {self._name}: engine.attention: triton fails here: {reason}"
                raise ConfigError(message) from error
            self._say(f"falling back to torch's attention: {reason}")
            runner.drop_kernels()
            _check_anew(runner, reference)

    def _compile(self, runner: TorchRunner, body: LlamaBody, reference: list[Tensor]) -> None:
        """The layers, unless that fails or gives other logits."""
        started = time.perf_counter()
        try:
            body.compile_layers()
            _check_anew(runner, reference)
        except Exception as error:  # compilers fail in many ways
            body.drop_compiled()
            self._say(f"layers are not compiled: {_first_line(error)}")
            return
        self._say(f"compiled its layers, {time.perf_counter() - started:.1f} s")

    def _written_out(self) -> tuple[TorchRunner, LlamaBody]:
        model = self._take_model()
        size = model.get_memory_footprint()
        # What runs in kernels is nothing that could be compiled further.
        kernels = self._has_kernels and not self._compiles
        body = LlamaBody(model, self._packs, self._shortlist, kernels, self._max_length)
        return self._runner(model, body, size - body.packing.saved), body

    def _finished(
        self, runner: TorchRunner, body: LlamaBody, reference: list[Tensor]
    ) -> TorchRunner:
        """With what a forward may have besides once it is written out and right."""
        self._report_packing(body.packing)
        if self._compiles:
            self._compile(runner, body, reference)
        if self._shortlist is not None:
            runner.deferred = Shortlist(runner, body, self._shortlist)
            count, size = len(self._shortlist), self._vocab_size
            self._say(f"proposes from a shortlist of {count} of {size} tokens")
        return runner

    def _do_without_shortlist(self) -> None:
        if self._shortlist is None:
            return
        problem = f"model {self._name}: only Llama-shaped models on a CPU may have a shortlist"
        if self._insists_on_shortlist:
            raise ConfigError(problem)
        self._report(f"{problem}; it is not used")
        self._shortlist = None

    def _runner(self, model: PreTrainedModel, body: Body | None, weight_bytes: int) -> TorchRunner:
        return TorchRunner(
            self._name,
            model,
            self._vocab_size,
            self._max_length,
            _little_store(),
            body,
            weight_bytes,
            self._attention,
        )

    def _take_model(self) -> PreTrainedModel:
        """To be changed at will: read anew if a step of the ladder has had the one that was."""
        model, self._unspent = self._unspent, None
        return self._read() if model is None else model

    def _read(self) -> PreTrainedModel:
        """The model with its rotary frequencies pinned."""
        self._say(f"loading {self._source.path}")
        started = time.perf_counter()
        model = self._source.model(self._dtype, self._device)
        rows = model.get_input_embeddings().weight.shape[0]
        if rows < self._vocab_size:
            raise ConfigError(
                f"model {self._name}: {rows} embedding rows for a tokenizer of "
                f"{self._vocab_size} tokens"
            )
        dtype = str(self._dtype).removeprefix("torch.")
        self._say(
            f"{model.num_parameters() / 1e6:.1f} M parameters, {dtype} on {self._device}, "
            f"{time.perf_counter() - started:.1f} s"
        )
        pin_rope(self._name, model, self._max_length)
        return model

    def _report_packing(self, packing: PackingReport) -> None:
        if self._packs:
            share = packing.packed / max(1, packing.considered)
            how = "kept in 16 bits" if self._dtype == torch.float32 else "multiplied as bfloat16"
            self._say(f"{share:.0%} of linear weights {how}")

    def _say(self, line: str) -> None:
        self._report(f"{self._name}: {line}")


def _check_anew(runner: TorchRunner, reference: list[Tensor]) -> None:
    """The self-check of a runner that has been forwarded before."""
    runner.store = _little_store()
    self_check.self_check(runner, reference)


def _little_store() -> KVStore:
    """As much as the self-check needs; real ones are sized when all members are loaded."""
    return KVStore(self_check.NUM_PAGES, self_check.PAGE_SIZE)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


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

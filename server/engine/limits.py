"""How large the batches of an engine may be, and what it may do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.config import ServerConfig
from server.runner.attention_choice import CpuKernels
from server.runner.base import ModelRunner


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes of an engine; see `EngineConfig` and `DecodingConfig` for their meaning.

    `runs_ahead`: None for wherever all models work beside the host, on GPUs. `half_batches`: None
    for wherever they pay. `cpu_kernels`: see `engine.row_kernels`.
    """

    max_sequences: int = 64
    max_step_tokens: int = 512
    max_gamma: int = 8
    max_waiting: int = 256
    max_prefill_tokens: int = 512
    prefix_cache: bool = True
    runs_ahead: bool | None = None
    half_batches: bool | None = None
    cpu_kernels: CpuKernels = "auto"

    @staticmethod
    def of(config: ServerConfig, runners: Iterable[ModelRunner]) -> EngineLimits:
        """What `config` says, and its `auto` means for these models."""
        engine = config.engine
        prefill = engine.max_prefill_tokens
        if prefill == "auto":  # about as long as a few steps of some sequences take on either
            prefill = 128 if any(runner.device.type == "cpu" for runner in runners) else 512
        return EngineLimits(
            max_sequences=engine.max_sequences,
            max_step_tokens=engine.max_step_tokens,
            max_gamma=config.decoding.max_gamma,
            max_waiting=engine.max_waiting,
            max_prefill_tokens=prefill,
            prefix_cache=engine.prefix_cache,
            runs_ahead=_SWITCH[engine.run_ahead],
            half_batches=_SWITCH[engine.half_batches],
            cpu_kernels=engine.cpu_kernels,
        )


_SWITCH = {"auto": None, "on": True, "off": False}

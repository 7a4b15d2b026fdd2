"""Which architectures this server runs, and what it fixes in them before it does."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from server.errors import ConfigError

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Their frequencies follow the longest sequence of a batch, which would let requests change each
# other's text.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def check_architecture(name: str, config: PreTrainedConfig) -> None:
    """Refuse what is not a stack of full or sliding-window attention.

    Raises:
        ConfigError: encoder-decoder, recurrent, convolutional or chunked layers.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"model {name}: {config.model_type} is an encoder-decoder, not supported")
    unknown = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        raise ConfigError(
            f"model {name}: {config.model_type} has layers of type {', '.join(sorted(unknown))}; "
            f"supported: {', '.join(sorted(LAYER_TYPES))}"
        )


def native_max_length(name: str, config: PreTrainedConfig) -> int:
    """Longest sequence the model was made for, in tokens.

    Raises:
        ConfigError: the config does not say.
    """
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 2:
        raise ConfigError(
            f"model {name}: the config of {config.model_type} names no max_position_embeddings"
        )
    return length


def pin_rope(name: str, model: PreTrainedModel, max_length: int) -> None:
    """Fix rotary frequencies that would otherwise depend on the longest sequence of a batch.

    They become those of a sequence of `max_length` tokens for every sequence, short ones too.

    Raises:
        ConfigError: such frequencies differ by layer type, which is not supported.
    """
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        kinds = set(rope_type.values()) if isinstance(rope_type, dict) else {rope_type}
        if not kinds & _BATCH_DEPENDENT_ROPE:
            continue
        if isinstance(rope_type, dict):
            raise ConfigError(f"model {name}: rope types differ by layer type: {rope_type}")
        _pin(module, str(rope_type), max_length)


def _pin(module: nn.Module, rope_type: str, max_length: int) -> None:
    config: Any = module.config
    old: Any = module.inv_freq
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, old.device, seq_len=max_length)
    module.register_buffer("inv_freq", frequencies.to(old.device), persistent=False)
    module.attention_scaling = scaling
    module.rope_type = "default"  # type: ignore[assignment]

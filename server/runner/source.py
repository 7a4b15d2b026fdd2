"""Where a member comes from: a directory, a GGUF file or the hub. All reading happens here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from server.config import ModelConfig
from server.errors import ConfigError

T = TypeVar("T")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class ModelSource:
    """Reads config, tokenizer and weights of one member; every failure is a ConfigError.

    Code shipped with a model is never run, pickles are never opened.
    """

    def __init__(self, member: ModelConfig) -> None:
        """Raises ConfigError when the path can be neither file, directory nor hub id."""
        self.name = member.name
        self.path = member.path
        self._revision = member.revision
        self._local = Path(member.path).expanduser()
        self._gguf = self._local.is_file()
        self._check_path()

    def config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = self._read("config.json", AutoConfig.from_pretrained)
        return config

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The fast tokenizer; of a GGUF file, the tokenizer.json beside it if there is one."""
        beside = self._gguf and (self._local.parent / "tokenizer.json").is_file()
        tokenizer = self._read("tokenizer", AutoTokenizer.from_pretrained, plain=beside)
        if not isinstance(tokenizer, PreTrainedTokenizerFast) or not tokenizer.get_vocab():
            raise ConfigError(f"model {self.name}: {self.path} has no fast tokenizer")
        return tokenizer

    def generation_config(self) -> GenerationConfig | None:
        """None where the member has none."""
        try:
            return GenerationConfig.from_pretrained(
                self._folder(), trust_remote_code=False, **self._at_revision()
            )
        except OSError:
            return None

    def model(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Weights in `dtype` on `device`, in eval mode.

        Raises:
            ConfigError: unreadable, incomplete or of other shapes than the config says.
        """
        model, info = self._read(
            "weights",
            AutoModelForCausalLM.from_pretrained,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            # They are refused below, by name; transformers would name its own option instead.
            ignore_mismatched_sizes=True,
        )
        for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
            if found := info.get(problem):
                what = problem.replace("_", " ")
                raise ConfigError(f"model {self.name}: {what} in {self.path}: {sorted(found)[:3]}")
        moved: PreTrainedModel = model.to(device).eval().requires_grad_(False)
        return moved

    def _check_path(self) -> None:
        if self._gguf and self._local.suffix != ".gguf":
            raise ConfigError(f"model {self.name}: {self.path} is a file but not .gguf")
        if self._local.is_dir():
            self._check_directory()
        elif not self._gguf and not self._may_be_hub_id():
            hint = " (`make models` makes the default pair)" if self._is_in_models() else ""
            raise ConfigError(f"model {self.name}: no directory or GGUF file at {self.path}{hint}")
        if self._revision is not None and not self._is_hub_id():
            raise ConfigError(f"model {self.name}: revision is for hub ids, not for {self.path}")

    def _is_hub_id(self) -> bool:
        return not self._gguf and not self._local.is_dir()

    def _is_in_models(self) -> bool:
        """Is it of the folder that default configurations name? Nothing there comes from a hub."""
        return self._local.parts[:1] == ("models",)

    def _may_be_hub_id(self) -> bool:
        """Whether the path reads organisation/name and is no path into a folder that is here."""
        is_relative = not self.path.startswith((".", "/", "~"))
        if not is_relative or self._is_in_models():
            return False
        return self.path.count("/") == 1 and not self._local.parent.is_dir()

    def _check_directory(self) -> None:
        def has(*patterns: str) -> bool:
            return any(any(self._local.glob(pattern)) for pattern in patterns)

        if not has("config.json"):
            raise ConfigError(f"model {self.name}: {self.path} has no config.json")
        if not has(*_TOKENIZER_FILES):
            raise ConfigError(f"model {self.name}: {self.path} has no tokenizer (tokenizer.json)")
        if not has("*.safetensors"):
            found = "only pickled weights, which are not opened" if has(*_PICKLES) else "no weights"
            raise ConfigError(f"model {self.name}: {self.path} has {found}; expected *.safetensors")

    def _at_revision(self) -> dict[str, str]:
        """Options of a from_pretrained."""
        return {} if self._revision is None else {"revision": self._revision}

    def _folder(self) -> str:
        return str(self._local.parent if self._gguf else self._local)

    def _read(self, what: str, load: Callable[..., T], plain: bool = False, **options: Any) -> T:
        """Call a from_pretrained; `plain` reads beside the GGUF file instead of in it."""
        if self._gguf and not plain:
            options["gguf_file"] = self._local.name
        source = self.path if self._is_hub_id() else self._folder()
        options |= self._at_revision()
        try:
            return load(source, trust_remote_code=False, **options)
        except Exception as error:  # parsers of broken files raise whatever they like
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if "trust_remote_code" in str(error):
                reason = "it needs code shipped with the model, which is never run"
            raise ConfigError(
                f"model {self.name}: cannot read {what} of {self.path}: {reason}"
            ) from error

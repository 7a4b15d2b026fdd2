"""How a request is decoded: the configuration, and the request's own `cos` object over it."""

from __future__ import annotations

from typing import Any, Literal

from server.api.protocol import CosOptions, GenerationRequest
from server.config import (
    CombinationConfig,
    ContrastiveConfig,
    DecodingConfig,
    LinearConfig,
    ServerConfig,
    StrategyName,
    WeightedConfig,
)
from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, LookupParams, proposal_lengths
from server.errors import ConfigError, RequestError

GammaSetting = int | tuple[int, ...] | Literal["auto"]
_PROPOSING: tuple[StrategyName, ...] = ("auto", "cos", "speculative")
_MAX_WEIGHT = 100  # beyond it float32 logits overflow


def make_combination(config: CombinationConfig, num_models: int) -> Combination:
    """Raises ValueError where it does not fit `num_models` models."""
    match config:
        case ContrastiveConfig():
            return Combination.contrastive(num_models, config.mu, config.plausibility)
        case WeightedConfig() | LinearConfig():
            if len(config.weights) != num_models:
                raise ValueError(f"{len(config.weights)} weights for {num_models} models")
            make = Combination.weighted if config.method == "weighted" else Combination.linear
            return make(config.weights)


class DecodingDefaults:
    """The configured decoding, from which requests depart."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError where the configuration contradicts itself."""
        self._decoding = config.decoding
        self._names = [model.name for model in config.models]
        try:
            self._combination = make_combination(config.combination, len(self._names))
        except ValueError as error:
            raise ConfigError(f"combination: {error}") from error
        if config.decoding.strategy == "mixture" and self._combination.method != "weighted":
            raise ConfigError(
                "decoding.strategy mixture needs combination.method weighted, "
                f"got {self._combination.method}"
            )

    def resolve(self, request: GenerationRequest) -> DecodingParams:
        """What this request's sequences are decoded by.

        Raises:
            RequestError: its `cos` object asks for what these models or limits do not allow.
        """
        options = request.cos or CosOptions()
        combination = self._resolve_combination(options)
        strategy = options.strategy or self._decoding.strategy
        if strategy == "mixture" and (problem := _mixture_problem(request, combination)):
            if options.strategy == "mixture":
                param, reason = problem
                raise RequestError(f"cos.strategy mixture needs {reason}", param=param)
            strategy = "cos"  # not this client's choice; the report says what was used
        if strategy == "single":
            combination = Combination.only(len(self._names), self._single(self._decoding))
        is_mixture = strategy == "mixture"
        # Coins of their own would make a text depend on when it went over to a mixture.
        may_mix = is_mixture or (
            strategy == "auto" and _mixture_problem(request, combination) is None
        )
        gamma = self._resolve_gamma(options)
        return DecodingParams(
            strategy=strategy,
            combination=combination,
            gamma=self._lengths(gamma, strategy),
            kappa=self._resolve_kappa(options) if is_mixture else 0,
            shared_coins=may_mix and self._shares_coins(request, options, strategy),
            is_gamma_auto=gamma == "auto" and strategy in _PROPOSING,
            verification=self._decoding.verification,
            lookup=self._resolve_lookup(options, strategy),
        )

    def _lengths(self, gamma: GammaSetting, strategy: StrategyName) -> tuple[int, ...]:
        limit = self._decoding.max_gamma
        if gamma == "auto":
            # A mixture's window ends by its coins; other lengths are where choosing begins.
            gamma = limit if strategy == "mixture" else "auto"
        return tuple(min(limit, each) for each in proposal_lengths(gamma, len(self._names)))

    def _resolve_combination(self, options: CosOptions) -> Combination:
        if options.combination is None:
            return self._combination
        try:
            combination = make_combination(options.combination, len(self._names))
            if max(map(abs, combination.weights)) > _MAX_WEIGHT:
                raise ValueError(
                    f"weights must lie within {_MAX_WEIGHT}, got {combination.weights}"
                )
            return combination
        except ValueError as error:
            raise RequestError(f"cos.combination: {error}", param="cos.combination") from error

    def _resolve_gamma(self, options: CosOptions) -> GammaSetting:
        gamma = options.gamma
        if gamma is None:
            return self._decoding.gamma
        if gamma == "auto":
            return "auto"
        if isinstance(gamma, list) and len(gamma) != len(self._names):
            raise RequestError(
                f"cos.gamma has {len(gamma)} entries for {len(self._names)} models",
                param="cos.gamma",
            )
        lengths = proposal_lengths(
            gamma if isinstance(gamma, int) else tuple(gamma), len(self._names)
        )
        self._check_length("cos.gamma", max(lengths))
        return lengths

    def _resolve_kappa(self, options: CosOptions) -> int:
        if options.kappa is None:
            return self._decoding.kappa
        self._check_length("cos.kappa", options.kappa)
        return options.kappa

    def _resolve_lookup(self, options: CosOptions, strategy: StrategyName) -> LookupParams | None:
        """Who asks for standard decoding by name gets it, unless it asks for lookup too."""
        config = self._decoding.prompt_lookup
        if options.prompt_lookup and (config is None or strategy == "mixture"):
            reason = "is not configured" if config is None else "does not go with strategy mixture"
            raise RequestError(
                f"cos.prompt_lookup: prompt lookup {reason}", param="cos.prompt_lookup"
            )
        wanted = options.prompt_lookup
        if wanted is None:
            wanted = options.strategy not in ("standard", "single")
        if config is None or not wanted or strategy == "mixture":
            return None
        longest = config.max_tokens or self._decoding.max_gamma
        return LookupParams(config.max_ngram, config.min_ngram, longest)

    def _check_length(self, param: str, value: int) -> None:
        limit = self._decoding.max_gamma
        if value > limit:
            raise RequestError(
                f"{param}: {value} is above this server's limit {limit}", param=param
            )

    def _shares_coins(
        self, request: GenerationRequest, options: CosOptions, strategy: StrategyName
    ) -> bool:
        """Choices of one request are independent, and a seed fixes the coins, unless it says so.

        Under auto a seed fixes the text, whatever the request says of coins.
        """
        if options.shared_coins is not None and (strategy != "auto" or request.seed is None):
            return options.shared_coins
        return self._decoding.shared_coins and (request.n or 1) == 1 and request.seed is None

    def _single(self, decoding: DecodingConfig) -> int:
        return (
            len(self._names) - 1 if decoding.single is None else self._names.index(decoding.single)
        )


def _mixture_problem(
    request: GenerationRequest, combination: Combination
) -> tuple[str, str] | None:
    """(field, what it would have to be) where a mixture is not the law that was asked for."""
    if combination.method != "weighted":
        return "cos.combination", f"combination method weighted, got {combination.method}"
    if request.effective_temperature == 0:
        return "temperature", "a temperature above 0: greedy text is not a mixture's"
    if request.num_logprobs is not None:
        return "logprobs", "no logprobs: a token's models need not all have scored it"
    return None


def describe_combination(combination: Combination) -> dict[str, Any]:
    """As the client would write it, effective weights included."""
    described: dict[str, Any] = {
        "method": combination.method,
        "weights": list(combination.weights),
    }
    if combination.plausibility:
        described["plausibility"] = combination.plausibility
    return described

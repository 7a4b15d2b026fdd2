"""An engine in this process with what a server gives it: costs, controller, metrics."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

from server.api.completion_protocol import CompletionRequest
from server.api.decoding import DecodingDefaults, make_combination
from server.bench.strategy_spec import StrategySpec
from server.config import ServerConfig
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.engine.calibration import calibrate
from server.engine.engine import Engine, EngineLimits
from server.metrics import Metrics
from server.runner.loader import load_models


class InProcessEngine:
    """Loads the models of a configuration and decodes texts of fixed lengths.

    Attributes:
        engine: of the models, calibrated.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError where the models cannot be loaded."""
        loaded = load_models(config)
        self._tokenizer = loaded.tokenizer.backend_tokenizer
        limits = EngineLimits.of(config, loaded.runners)
        metrics = Metrics(config)
        self._defaults = DecodingDefaults(config)
        self._numbers = itertools.count()
        # No token ends a text: all have the lengths that were asked for.
        self.engine = Engine(
            loaded.runners, self._tokenizer, frozenset(), limits, on_step=metrics.observe_step
        )
        combination = make_combination(config.combination, len(config.models))
        costs = calibrate(self.engine, combination)
        if costs is not None:
            self.engine.control(costs)

    def start(
        self,
        prompt: str,
        params: SamplingParams,
        strategy: StrategySpec,
    ) -> Sequence:
        """A text of `params.max_tokens` tokens, now waiting in the engine."""
        request = CompletionRequest.model_validate(
            {"model": "", "prompt": "", "temperature": params.temperature, "cos": strategy.override}
        )
        params = replace(params, ignore_eos=True)
        decoding = self._defaults.resolve(request)
        ids = self._tokenizer.encode(prompt).ids
        sequence = Sequence.start(f"bench-{next(self._numbers)}", ids, params, decoding)
        self.engine.add(sequence)
        return sequence

    def drop(self, sequences: Iterable[Sequence]) -> None:
        """They are not written on."""
        for sequence in sequences:
            self.engine.abort(sequence.id)

    def step(self) -> None:
        """One step of the engine."""
        self.engine.step()

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
from server.decoding.grammar import GrammarError, GrammarMatcher, Grammars
from server.engine.calibration import calibrate
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.errors import ConfigError
from server.metrics import Metrics
from server.runner.loader import load_models


class InProcessEngine:
    """Loads the models of a configuration and decodes texts of fixed lengths, or of a form.

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
        self._grammars = Grammars.of(self._tokenizer, loaded.vocab_size, loaded.eos_token_ids)
        self._numbers = itertools.count()
        # No token ends a text: all have the lengths that were asked for, or that a form has.
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
        schema: str | None = None,
    ) -> Sequence:
        """A text of `params.max_tokens` tokens, now waiting in the engine.

        With a JSON schema it follows that, and ends with it. Raises ConfigError where it is none.
        """
        request = CompletionRequest.model_validate(
            {
                "model": "",
                "prompt": "",
                "temperature": params.temperature,
                "seed": params.seed if params.is_seeded else None,
                "cos": strategy.override,
            }
        )
        params = replace(params, ignore_eos=True)
        decoding = self._defaults.resolve(request)
        ids = self._tokenizer.encode(prompt).ids
        matcher = None if schema is None else self._matcher(schema)
        sequence = Sequence.start(
            f"bench-{next(self._numbers)}", ids, params, decoding, matcher=matcher
        )
        self.engine.add(sequence)
        return sequence

    def _matcher(self, schema: str) -> GrammarMatcher:
        try:
            [matcher] = self._grammars.matchers("json", schema, 1)
        except GrammarError as error:
            raise ConfigError(f"--schema: {error}") from error
        return matcher

    def drop(self, sequences: Iterable[Sequence]) -> None:
        """They are not written on."""
        for sequence in sequences:
            self.engine.abort(sequence.id)

    def step(self) -> None:
        """One step of the engine."""
        self.engine.step()

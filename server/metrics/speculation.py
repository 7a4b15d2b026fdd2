"""Proposals and what became of them."""

from __future__ import annotations

from collections import Counter as Tally
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.config import LOOKUP_NAME, StrategyName
from server.core.stats import LookupOutcome, StepStats

STRATEGIES: tuple[StrategyName, ...] = ("standard", "speculative", "cos", "mixture")
LOOKUPS: tuple[LookupOutcome, ...] = get_args(LookupOutcome)


class SpeculationMetrics:
    """Proposals and what became of them; bonus tokens count as proposals of their model."""

    def __init__(self, registry: CollectorRegistry, names: tuple[str, ...], max_gamma: int) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        position = "place in the pending tail, 0-based"
        self.proposed = counter(
            "cos_spec_draft_tokens", "Tokens proposed, bonus tokens included.", "proposer"
        )
        self.accepted = counter(
            "cos_spec_accepted_tokens", "Proposed tokens that were accepted.", "proposer"
        )
        self.verified_at = counter(
            "cos_spec_verified_tokens_per_position",
            f"Proposed tokens that were verified, by {position}: the denominator of acceptance "
            "there. Those behind a rejection never are.",
            "proposer",
            "position",
        )
        self.accepted_at = counter(
            "cos_spec_accepted_tokens_per_position",
            f"Proposed tokens that were accepted, by {position}.",
            "proposer",
            "position",
        )
        self.bonus = counter(
            "cos_spec_bonus_tokens",
            "Tokens a model proposed right after scoring proposals of others.",
            "model",
        )
        self.recovered = counter("cos_spec_recovered_tokens", "Tokens taken after a rejection.")
        self.drawn = counter("cos_spec_drawn_tokens", "Tokens taken with nothing proposed.")
        self.forced = counter(
            "cos_forced_tokens",
            "Tokens taken because a form allowed no other; no model decided them.",
        )
        self.discarded = counter(
            "cos_spec_discarded_tokens", "Verified tokens cut off by the end of the text."
        )
        self.tails = Histogram(
            "cos_spec_tail_tokens",
            "Tokens pending where a verification began; one observation for each cycle.",
            buckets=range(1, max_gamma + len(names)),
            registry=registry,
        )
        self.gamma = Histogram(
            "cos_spec_gamma",
            "Proposal length of the first model, of texts whose strategy proposes.",
            buckets=range(1, max_gamma + 1),
            registry=registry,
        )
        self.lookups = counter(
            "cos_prompt_lookups",
            "Times prompt lookup was asked what comes next, by what came of it.",
            "outcome",
        )
        self.chosen = counter(
            "cos_auto_choices",
            "Texts that auto moved to other lengths or to a strategy while they ran.",
            "strategy",
        )
        self.chosen_gamma = Histogram(
            "cos_auto_gamma",
            "Proposal lengths that auto moved texts to; 0 is a model that only scores.",
            ("proposer",),
            buckets=range(max_gamma + 1),
            registry=registry,
        )
        self._names = names
        self._proposers = (*names, LOOKUP_NAME)  # LOOKUP, -1, is the last
        # The longest tail: a whole proposal, and a bonus of every other model.
        self._positions = [str(i) for i in range(max_gamma + len(names))]
        for strategy in STRATEGIES:
            self.chosen.labels(strategy)
        for outcome in LOOKUPS:
            self.lookups.labels(outcome)
        for name in names:
            self.chosen_gamma.labels(name)
            self.bonus.labels(name)
        for name in self._proposers:
            self.proposed.labels(name)
            self.accepted.labels(name)
            for index in self._positions:
                self.verified_at.labels(name, index)
                self.accepted_at.labels(name, index)

    def observe(self, stats: StepStats) -> None:
        self._observe_proposed(stats)
        for outcome in stats.lookups:
            self.lookups.labels(outcome).inc()
        for (proposer, offset, accepted), count in Tally(stats.verified_by_offset).items():
            index = self._positions[min(offset, len(self._positions) - 1)]
            self.verified_at.labels(self._proposers[proposer], index).inc(count)
            if accepted:
                self.accepted_at.labels(self._proposers[proposer], index).inc(count)
                self.accepted.labels(self._proposers[proposer]).inc(count)
        for length in stats.tails:
            self.tails.observe(length)
        for delivery in stats.deliveries:
            decoding = delivery.decoding
            # A mixture proposes where its first model drafts through others' coins.
            proposes = decoding.strategy in ("cos", "speculative") or decoding.kappa > 0
            if delivery.has_first and proposes:
                self.gamma.observe(decoding.gamma[0])
        for decoding in stats.chosen:
            self.chosen.labels(decoding.strategy).inc()
            if decoding.strategy in ("cos", "speculative"):
                for model, length in zip(self._names, decoding.gamma, strict=True):
                    self.chosen_gamma.labels(model).observe(length)
        self.recovered.inc(stats.num_recovered)
        self.drawn.inc(stats.num_drawn)
        self.forced.inc(stats.num_forced)
        self.discarded.inc(stats.num_discarded)

    def _observe_proposed(self, stats: StepStats) -> None:
        name = self._names[stats.model]
        if stats.num_proposed:
            self.proposed.labels(name).inc(stats.num_proposed)
            self.bonus.labels(name).inc(stats.num_bonus)
        if stats.num_looked_up:
            self.proposed.labels(LOOKUP_NAME).inc(stats.num_looked_up)

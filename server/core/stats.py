"""What one engine step did, for whoever counts: plain data, no metrics library."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from server.core.sampling_params import DecodingParams

Phase = Literal["prefill", "propose", "score"]
ShadowOutcome = Literal["measured", "abandoned"]
# What came of asking prompt lookup: what it found was proposed; it was withheld, as too
# rarely right of late, not worth its seconds or not allowed; the last tokens were not found.
LookupOutcome = Literal["proposed", "withheld", "missed"]
# What the engine survives:
# invalid_scores    a sequence's scores are no distribution; it ends
# internal          an error in the path of one sequence; it ends
# out_of_memory     a sequence does not fit into the machine's memory even alone; it ends
# memory_pressure   a step did not fit; smaller ones follow
Fault = Literal["invalid_scores", "internal", "out_of_memory", "memory_pressure"]


@dataclass(frozen=True, slots=True)
class Delivery:
    """Tokens that one step added to one client's text, its end minded."""

    decoding: DecodingParams
    num_tokens: int
    has_first: bool
    num_forced: int = 0

    @property
    def num_decoded(self) -> int:
        """Without the first token of the text, which comes with the prompt, and forced ones."""
        return self.num_tokens - self.has_first - self.num_forced


@dataclass(slots=True)
class ShadowStats:
    """One step beside standard decoding as it was measured; see `engine.shadow`.

    Attributes:
        standard_seconds, standard_tokens: of a round of standard decoding that this step ended.
        baseline_seconds, decode_seconds: what standard decoding took for as many tokens, and what
            the step took; both 0 where it was not measured, and while it is.
        outcome: of a measurement that this step ended, if it did.
    """

    standard_seconds: float = 0.0
    standard_tokens: int = 0
    baseline_seconds: float = 0.0
    decode_seconds: float = 0.0
    outcome: ShadowOutcome | None = None


@dataclass(slots=True)
class StepStats:
    """One advance of one model over many sequences.

    Attributes:
        model: index of the model that ran.
        num_sequences: sequences it ran over, and how many of them were decoding.
        num_past: tokens that the model had read of the decoding ones before, in all; num_attended
            of them, those that it attends once for several counted once.
        num_tokens: tokens fed; num_prefill_tokens of them were prompts or recomputation.
        forward_seconds: the model's forward alone.
        combine_seconds: of the advance without the forward: warping, combining, verifying, drawing,
            proposing, log-probabilities of prompts.
        step_seconds: the whole step, both included; the rest is planning and text, which take no
            time where the device is still busy with what was enqueued before. Where steps overlap,
            its share of what they took together, which may be less than its forward.
        overlaps: steps over other sequences ran meanwhile.
        num_proposed: tokens the model proposed (one a sequence).
        num_bonus: those of them that follow a verification of other models' proposals.
        num_looked_up: tokens that prompt lookup proposed.
        lookups: what came of asking it, one entry for each sequence.
        verified_by_offset: [(proposer, offset, accepted)] for each verification; offset is the
            place of the token in its pending tail, 0-based.
        tails: tokens that were pending where a verification began, one entry for each.
        chosen: what was chosen anew for sequences that leave it open, one entry for each.
        num_recovered, num_drawn: tokens taken after a rejection, and with nothing proposed.
        num_forced: tokens taken because a form allowed no other.
        deliveries: what clients got.
        prefill_seconds: what prompts added to the step; None if that is unknown.
        baseline_seconds: what standard decoding of it would have taken; None if that is unknown.
        shadow: None where standard decoding is not measured on the live load.
        num_discarded: verified tokens cut off by the end of the text.
        num_preempted: sequences preempted since the last step, for this one.
        num_cached: [num_models] tokens found in the prefix cache since then, not computed.
        num_running, num_waiting: after the step.
        pages_used: [num_models] after the step.
    """

    model: int
    num_sequences: int = 0
    num_decoding: int = 0
    num_tokens: int = 0
    num_prefill_tokens: int = 0
    num_past: int = 0
    num_attended: int = 0
    forward_seconds: float = 0.0
    combine_seconds: float = 0.0
    step_seconds: float = 0.0
    overlaps: bool = False
    num_proposed: int = 0
    num_bonus: int = 0
    num_looked_up: int = 0
    lookups: list[LookupOutcome] = field(default_factory=list)
    verified_by_offset: list[tuple[int, int, bool]] = field(default_factory=list)
    tails: list[int] = field(default_factory=list)
    chosen: list[DecodingParams] = field(default_factory=list)
    num_recovered: int = 0
    num_drawn: int = 0
    num_forced: int = 0
    deliveries: list[Delivery] = field(default_factory=list)
    prefill_seconds: float | None = None
    baseline_seconds: float | None = None
    shadow: ShadowStats | None = None
    num_discarded: int = 0
    num_preempted: int = 0
    num_cached: tuple[int, ...] = ()
    num_running: int = 0
    num_waiting: int = 0
    pages_used: tuple[int, ...] = ()

    @property
    def decode_seconds(self) -> float:
        """The step's seconds without those of prompts; by share of tokens where unknown."""
        if self.prefill_seconds is not None:
            return self.step_seconds - self.prefill_seconds
        num_decode_tokens = self.num_tokens - self.num_prefill_tokens
        return self.step_seconds * num_decode_tokens / max(1, self.num_tokens)

    @property
    def num_generated(self) -> int:
        """Tokens delivered to clients."""
        return sum(delivery.num_tokens for delivery in self.deliveries)

    @property
    def phase(self) -> Phase:
        """What most of the step was for."""
        if 2 * self.num_prefill_tokens > self.num_tokens:
            return "prefill"
        if self.num_proposed - self.num_bonus > len(self.tails):
            return "propose"
        return "score"

"""What one advance does, from its launch on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from server.core.output import TokenLogprob
from server.core.sequence import Sequence
from server.core.stats import Fault, StepStats
from server.engine.faults import is_out_of_memory
from server.engine.laps import Laps
from server.engine.scheduler import StepPlan

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Outcome:
    """What one advance did.

    Attributes:
        num_new: verified tokens, for each sequence that got any.
        num_forced: those of them, the last ones, that a grammar left no choice about.
        logprobs: one entry for each of them, where the request asked.
        prompt_logprobs: of further tokens of prompts, where the request asked.
        failed: sequences whose scores are no distribution.
        untrusted: those of them whose models gave no numbers: their pages may hold what made them.
        broken: sequences in whose path an error was raised.
        verdicts: (sequence, proposer, was it accepted) of models' proposals; see `Advancer.learn`.
        ran_out: of memory, after the forward.
        has_read: the host has waited for what the device decided after the forward.
        stats: counts for metrics, without seconds.
        laps: what will say them.
    """

    stats: StepStats
    laps: Laps
    num_new: dict[Sequence, int] = field(default_factory=dict)
    num_forced: dict[Sequence, int] = field(default_factory=dict)
    logprobs: dict[Sequence, list[TokenLogprob]] = field(default_factory=dict)
    prompt_logprobs: dict[Sequence, list[TokenLogprob]] = field(default_factory=dict)
    failed: set[Sequence] = field(default_factory=set)
    untrusted: set[Sequence] = field(default_factory=set)
    broken: dict[Sequence, Fault] = field(default_factory=dict)
    verdicts: list[tuple[Sequence, int, bool]] = field(default_factory=list)
    ran_out: bool = False
    has_read: bool = False

    def fault_of(self, sequence: Sequence) -> Fault | None:
        """Why a sequence must end; None where it may go on."""
        return "invalid_scores" if sequence in self.failed else self.broken.get(sequence)


@dataclass(frozen=True, slots=True)
class Flight:
    """An advance that is launched and not landed.

    Attributes:
        plan: that is run.
        outcome: so far.
        deciding: its sequences whose tokens it decides.
        verified_before: tokens of each that were verified when it was launched.
        drafting: those that drafted from the shortlist before.
        sent: scores that cross from one device to another, see `Scores.receive`.
    """

    plan: StepPlan
    outcome: Outcome
    deciding: frozenset[Sequence]
    verified_before: dict[Sequence, int]
    drafting: frozenset[Sequence]
    sent: torch.cuda.Event | None


@contextmanager
def guarding(sequence: Sequence, outcome: Outcome) -> Iterator[None]:
    """An error in here breaks `sequence`, and nothing else."""
    try:
        yield
    except Exception as error:
        logger.exception("sequence %s is broken", sequence.id)
        outcome.broken[sequence] = "out_of_memory" if is_out_of_memory(error) else "internal"

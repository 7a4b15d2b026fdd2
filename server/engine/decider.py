"""Decides tokens: draws them, proposes them, and verifies what was proposed.

On a CPU that can run them kernels do it for most requests (`engine.row_kernels`), row by row and no
further than to a window's first rejected token; torch's operations do it for all others. Which of
the two a request is decided by depends on nothing but the request.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Row
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from server.core.sequence import Sequence
from server.decoding.rng import Purpose
from server.decoding.strategies import Strategies
from server.decoding.verify import Decisions, Rule, verify, verify_blocks, verify_picks
from server.decoding.warp import Place
from server.engine.distributions import Distributions
from server.engine.scores import Scores
from server.errors import ConfigError
from server.runner.attention_choice import CpuKernels
from server.runner.base import ModelRunner
from server.simd import support

if TYPE_CHECKING:
    from server.engine.row_kernels import RowKernels  # needs what may be missing

logger = logging.getLogger(__name__)


class Way(NamedTuple):
    """How a sequence's tokens are decided; those of one way may be decided together.

    Attributes:
        rule: of verification.
        by_kernels: and not by torch's operations.
    """

    rule: Rule
    by_kernels: bool

    @property
    def is_coupled(self) -> bool:
        """Proposals and targets share their randomness, or have none."""
        return self.rule == "coupled"


class Decider:
    """Over places that have been scored; results are on the device of the distributions."""

    def __init__(self, distributions: Distributions, kernels: RowKernels | None) -> None:
        """`kernels`: None where they cannot run, or are not to."""
        self._distributions = distributions
        self._kernels = kernels

    def way(self, sequence: Sequence) -> Way:
        """How tokens of `sequence` are decided at present."""
        rule: Rule = "block" if sequence.schedule.verifies_blocks else "token"
        if sequence.params.is_coupled:
            rule = "coupled"
        return Way(rule, self._kernels is not None and self._kernels.takes(sequence))

    def draw(self, places: list[Place], way: Way) -> Tensor:
        """A token of each place from its target, int64 [R]; see `verify.sample`."""
        if (kernels := self._kernels_for(way)) is None:
            return self._distributions.draw(places, way.is_coupled)
        return kernels.draw(places, way.is_coupled, self._uniforms(places, way, Purpose.DRAW))

    def propose(self, model: int, places: list[Place], way: Way, from_shortlist: bool) -> Tensor:
        """A token of each place from the distribution of `model` alone, as `draw`."""
        if (kernels := self._kernels_for(way)) is not None:
            uniforms = self._uniforms(places, way, Purpose.PROPOSE)
            return kernels.propose(model, places, way.is_coupled, from_shortlist, uniforms)
        return self._distributions.propose(model, places, way.is_coupled, from_shortlist)

    def verify(
        self, places: list[Place], tokens: Tensor, lengths: list[int], way: Way
    ) -> Decisions:
        """Decide windows of proposed tokens.

        Args:
            places: of the rows of all windows, one window after the other.
            tokens: proposed there, int64 [R].
            lengths: rows of each window.
            way: of all the sequences.
        """
        distributions = self._distributions
        uniforms = (
            self._uniforms(places, way, Purpose.ACCEPT),
            self._uniforms(places, way, Purpose.RECOVER),
        )
        if (kernels := self._kernels_for(way)) is not None:
            return kernels.verify(places, tokens, lengths, way.rule, uniforms)
        if way.is_coupled:
            return verify_picks(distributions.pick_target(places), tokens, lengths)
        rule = verify_blocks if way.rule == "block" else verify
        target, proposal = distributions.target(places), distributions.proposal(places)
        return rule(target, proposal, tokens, lengths, *uniforms)

    def _kernels_for(self, way: Way) -> RowKernels | None:
        return self._kernels if way.by_kernels else None

    def _uniforms(self, places: list[Place], way: Way, purpose: Purpose) -> Tensor:
        """float32 [R]; nobody asks for those of coupled places."""
        if way.is_coupled:
            return torch.zeros(len(places), device=self._distributions.device)
        return self._distributions.uniforms(places, purpose)


def find_kernels(
    runners: Row[ModelRunner],
    scores: Scores,
    strategies: Strategies,
    eos_token_ids: frozenset[int],
    wanted: CpuKernels,
) -> RowKernels | None:
    """Kernels for the scores of these models; None where they are not wanted, or not to be had.

    Raises:
        ConfigError: they are wanted `on` and give other tokens than they should, or none.
    """
    can_run = support.missing() is None and all(
        runner.device.type == "cpu" and runner.dtype in support.BITS for runner in runners
    )
    if wanted == "off" or not can_run:
        return None
    from server.engine.row_kernels import RowKernels, check  # needs what may be missing

    try:
        check()
    except Exception as error:  # a kernel may fail to compile in any way
        reason = str(error).split("\n")[0]
        if wanted == "on":
            raise ConfigError(f"engine.cpu_kernels: on, but they fail here: {reason}") from error
        logger.warning("tokens are decided by torch's operations, kernels fail: %s", reason)
        return None
    return RowKernels(scores, strategies, eos_token_ids, len(runners), runners[0].vocab_size)

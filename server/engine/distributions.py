"""What tokens come from at given places of sequences: targets, proposals, and their randomness."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from server.cache.on_device import sent, tensor_on
from server.core.combination import Combination
from server.core.lookup import LOOKUP
from server.decoding.combine import combine, log_combined, rank
from server.decoding.rng import Purpose, exponentials, round_seed, uniforms
from server.decoding.strategies import Strategies
from server.decoding.verify import pick, sample
from server.decoding.warp import Place, Warp
from server.engine.scores import Scores

Key = TypeVar("Key")
Item = TypeVar("Item")
Origin = tuple[int, bool]  # of a pending token: its proposer, and whether from the shortlist


class Distributions:
    """Of places that have been scored; tensors are on `device`.

    They are not read there, but by `overlap`, and where a target with top-p may need a whole row
    sorted or a shortlist may be empty.

    A place is *coupled* where its sequence's proposals and targets share their randomness
    (`decoding.verify`).
    """

    def __init__(
        self,
        scores: Scores,
        strategies: Strategies,
        eos_token_ids: frozenset[int],
        num_models: int,
        vocab_size: int,
    ) -> None:
        self.device = scores.device
        self._scores = scores
        self._strategies = strategies
        self._eos = eos_token_ids
        self._num_models = num_models
        self._vocab_size = vocab_size

    def target(self, places: list[Place]) -> Tensor:
        """The target r of each place, float32 [len(places), V]."""

        def evaluate(combination: Combination, group: list[Place]) -> Tensor:
            return combine(partial(self._read, group), combination, self._warp(group))

        return self._by_key(places, self._combination, evaluate)

    def target_logprobs(self, places: list[Place]) -> Tensor:
        """Logarithm of r before temperature and truncation, float32 [len(places), V].

        What is plausible is what it is for the text's own law.
        """

        def evaluate(combination: Combination, group: list[Place]) -> Tensor:
            warp = self._warp(group) if combination.plausibility > 0 else None
            return log_combined(partial(self._read, group), combination, warp)

        return self._by_key(places, self._combination, evaluate)

    def prompt_logprobs(self, places: list[Place], combination: Combination) -> Tensor:
        """Logarithm of r by one combination, whatever decides the places, without any mask."""
        return log_combined(partial(self._read, places), combination)

    def proposal(self, places: list[Place]) -> Tensor:
        """What the pending token of each place was drawn from (g), float32 [len(places), V]."""

        def evaluate(origin: Origin, group: list[Place]) -> Tensor:
            if origin[0] == LOOKUP:
                return self._one_hot([sequence.token_ids[position] for sequence, position in group])
            return self._warp(group, proposing=True).probs(self._own_scores(origin, group))

        return self._by_key(places, origin_of, evaluate)

    def draw(self, places: list[Place], is_coupled: bool) -> Tensor:
        """A token of each place from its target, int64 [len(places)]; see `verify.sample`."""
        if is_coupled:
            return self.pick_target(places)
        return sample(self.target(places), self.uniforms(places, Purpose.DRAW))

    def propose(
        self, model: int, places: list[Place], is_coupled: bool, from_shortlist: bool
    ) -> Tensor:
        """A token of each place from the distribution of `model` alone, as `draw`."""
        origin = model, from_shortlist
        if is_coupled:
            return self._own_picks(origin, places)
        probs = self._warp(places, proposing=True).probs(self._own_scores(origin, places))
        return sample(probs, self.uniforms(places, Purpose.PROPOSE))

    def pick_target(self, places: list[Place]) -> Tensor:
        """The token of each coupled place by its target, int64 [len(places)]."""

        def key(place: Place) -> tuple[bool, Combination]:
            return place[0].params.is_greedy, self._combination(place)

        def evaluate(how: tuple[bool, Combination], group: list[Place]) -> Tensor:
            is_greedy, combination = how
            return self._pick(
                is_greedy, combination, group, partial(self._read, group), self._warp(group)
            )

        return self._by_key(places, key, evaluate)

    def overlap(self, model: int, place: Place) -> float:
        """How probably a token of `model` is accepted at a decided place; read from the device."""
        sequence, position = place
        if sequence.params.is_coupled:
            token = self._own_picks((model, False), [place])
            return float(token == sequence.token_ids[position])
        proposal = self._warp([place], proposing=True).probs(self._scores.read(model, [place]))
        return float(torch.minimum(proposal, self.target([place])).sum())

    def uniforms(self, places: list[Place], purpose: Purpose) -> Tensor:
        """float32 [len(places)], none of them used before a sequence's last rejection."""
        seeds = [round_seed(s.params.seed, s.num_rejections) for s, _ in places]
        return uniforms(seeds, [position for _, position in places], purpose, self.device)

    def _own_picks(self, origin: Origin, places: list[Place]) -> Tensor:
        """The token that a model proposes at each coupled place, int64 [len(places)]."""
        only = Combination.only(self._num_models, origin[0])

        def evaluate(is_greedy: bool, group: list[Place]) -> Tensor:
            scores = partial(self._own_of, origin[1], group)
            return self._pick(is_greedy, only, group, scores, self._warp(group, proposing=True))

        return self._by_key(places, lambda place: place[0].params.is_greedy, evaluate)

    def _pick(
        self,
        is_greedy: bool,
        combination: Combination,
        places: list[Place],
        scores: Callable[[int], Tensor],
        warp: Warp,
    ) -> Tensor:
        if is_greedy:
            return pick(rank(scores, combination, warp))
        return pick(combine(scores, combination, warp), self._noise(places))

    def _noise(self, places: list[Place]) -> Tensor:
        """float32 [len(places), V], the same for everyone who picks a token there."""
        seeds = [sequence.params.seed for sequence, _ in places]
        positions = [position for _, position in places]
        return exponentials(seeds, positions, self._vocab_size, self.device)

    def _one_hot(self, token_ids: list[int]) -> Tensor:
        """float32 [len(token_ids), V]."""
        tokens = tensor_on(self.device, token_ids)[:, None]
        rows = torch.zeros(len(token_ids), self._vocab_size, device=self.device)
        return rows.scatter_(1, tokens, 1.0)

    def _own_scores(self, origin: Origin, places: list[Place]) -> Tensor:
        """Raw scores that tokens of this origin are drawn from, float32 [len(places), V].

        Where the request allows no token of the shortlist, the whole vocabulary it is: that too is
        settled before a token is drawn.
        """
        model, from_shortlist = origin
        if not from_shortlist:
            return self._scores.read(model, places)
        listed = self._scores.read_shortlist(model, places)
        is_empty = self._warp(places)(listed).amax(-1, keepdim=True) == -torch.inf
        if not is_empty.any():
            return listed
        return torch.where(is_empty, self._scores.read(model, places), listed)

    def _own_of(self, from_shortlist: bool, places: list[Place], model: int) -> Tensor:
        return self._own_scores((model, from_shortlist), places)

    def _read(self, places: list[Place], model: int) -> Tensor:
        return self._scores.read(model, places)

    def _warp(self, places: list[Place], proposing: bool = False) -> Warp:
        return Warp(places, self._eos, self.device, proposing)

    def _combination(self, place: Place) -> Combination:
        sequence, position = place
        return self._strategies.of(sequence).target(sequence, position)

    def _by_key(
        self,
        places: list[Place],
        key: Callable[[Place], Key],
        evaluate: Callable[[Key, list[Place]], Tensor],
    ) -> Tensor:
        """Evaluate places that share a key together, and put the rows back in order."""
        groups = grouped(list(range(len(places))), lambda row: key(places[row]))
        if len(groups) == 1:
            return evaluate(groups[0][0], places)
        parts = [evaluate(k, [places[row] for row in rows]) for k, rows in groups]
        order = torch.tensor([row for _, rows in groups for row in rows])
        return torch.cat(parts).index_select(0, sent(order.argsort(), self.device))


def grouped(items: list[Item], key: Callable[[Item], Key]) -> list[tuple[Key, list[Item]]]:
    """Items by key, in order of first appearance."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


def origin_of(place: Place) -> Origin:
    """Of the pending token at `place`."""
    sequence, position = place
    offset = position - sequence.num_verified
    proposal = sequence.tail[offset]
    return proposal.proposer, proposal.from_shortlist

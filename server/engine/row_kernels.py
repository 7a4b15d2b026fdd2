"""Decisions by the CPU's kernels, for requests whose distributions they know how to make.

Imported only where the kernels can run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence as Row
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from server.core.combination import Combination
from server.core.lookup import LOOKUP
from server.core.sequence import Sequence
from server.decoding.rng import exponentials, noise_key
from server.decoding.score_changes import Ids, Reals
from server.decoding.strategies import Strategies
from server.decoding.verify import Decisions, Rule
from server.decoding.warp import Place
from server.engine.distributions import Origin, grouped, origin_of
from server.engine.row_adjustments import Adjuster, Adjustments
from server.engine.scores import Scores
from server.simd.decisions import (
    BLOCKS,
    CERTAIN,
    DRAWN,
    NARROW,
    PICKS,
    SHORT,
    TOKENS,
    WIDE,
    decider,
    scratch_bytes,
)
from server.simd.support import BITS
from server.simd.weights import BLOCK, INVALID, NOTHING, padded

Key = TypeVar("Key")
Allowed = list[NDArray[np.bool_] | None]  # of some rows' tokens; None: all of them

_RULES: dict[Rule, int] = {"token": TOKENS, "coupled": PICKS, "block": BLOCKS}
_CHECKED = 300  # columns
_KINDS = {32: WIDE, 16: NARROW}  # by the bits of a score


@dataclass(frozen=True, slots=True)
class _Laws:
    """What R rows are drawn from, as the kernel takes it.

    Attributes:
        num_columns: of a row.
        bits: [K] of a score.
        scores, scales, shares: [R, K].
        plausibility: floors and references, [R] each, or None.
        limits: [R, NUM_LIMITS], or None.
        noises: [R, NOISE], or None.
        columns: float32 [num_columns, up to whole blocks]: their tokens, if noises are not of all.
        ids: int64 [num_columns]: their tokens, if they are not all.
        adjustments: of all rows, and of what was proposed there; None: there are none.
        kept: what the addresses point into.
    """

    num_columns: int
    bits: Ids
    scores: Ids
    scales: Reals
    shares: Reals
    plausibility: tuple[Reals, Ids] | None = None
    limits: Reals | None = None
    noises: Ids | None = None
    columns: Tensor | None = None
    ids: Tensor | None = None
    adjustments: Adjustments | None = None
    kept: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Origins:
    """What the tokens of R rows were proposed from: [R, 4] and [R]; `kept` as of _Laws."""

    numbers: Ids
    scales: Reals
    kept: tuple[Tensor, ...]


class RowKernels:
    """Draws and verifies; what is taken of a request depends on nothing but the request."""

    def __init__(
        self,
        scores: Scores,
        strategies: Strategies,
        eos_token_ids: frozenset[int],
        num_models: int,
        vocab_size: int,
    ) -> None:
        self._scores = scores
        self._strategies = strategies
        self._num_models = num_models
        self._vocab_size = vocab_size
        self._bits = np.array([BITS[scores.dtype(k)] for k in range(num_models)])
        self._adjuster = Adjuster(eos_token_ids, padded.py_func(vocab_size))

    def takes(self, sequence: Sequence) -> bool:
        """Is the sequence's every distribution of a kind that kernels make?"""
        return self._adjuster.takes(sequence)

    def draw(self, places: list[Place], is_coupled: bool, uniforms: Tensor) -> Tensor:
        """A token of each place from its target, int64 [R]; see `verify.sample` and `pick`."""
        return self._draw(self._targets(places), is_coupled, uniforms)

    def propose(
        self, model: int, places: list[Place], is_coupled: bool, is_short: bool, uniforms: Tensor
    ) -> Tensor:
        """The same from `model` alone."""
        if not is_short:
            return self._draw(self._alone(model, places), is_coupled, uniforms)
        rows, ids = self._scores.shortlist(model, places)
        scales, noises = _inverse_temperatures(places), _noises(places)
        adjustments = self._adjuster.adjustments(places, scales)
        laws = _Laws(
            num_columns=rows.shape[1],
            bits=np.array([32]),
            scores=_addresses(rows)[:, None],
            scales=scales[:, None],
            shares=np.zeros((len(places), 1), np.float32),
            limits=_limits(places),
            noises=noises,
            columns=None if noises is None else _padded(ids),
            ids=ids,
            adjustments=adjustments,
            kept=rows,
        )
        numbers = self._draw(laws, is_coupled, uniforms)
        tokens = torch.where(numbers == INVALID, INVALID, ids[numbers])
        if empty := _empty(rows, scales, _allowed(adjustments, range(len(places)), ids)):
            whole = self._alone(model, [places[row] for row in empty])
            tokens[empty] = self._draw(whole, is_coupled, uniforms[empty])
        return tokens

    def verify(
        self,
        places: list[Place],
        tokens: Tensor,
        lengths: list[int],
        rule: Rule,
        uniforms: tuple[Tensor, Tensor],
    ) -> Decisions:
        """As `verify.verify`, `verify_picks` and `verify_blocks`.

        Args:
            places: of the rows of all windows.
            tokens: proposed there, int64 [R].
            lengths: of the windows.
            rule: of all the sequences.
            uniforms: float32 [R] each, that decide acceptance and draw what is recovered.
        """
        laws = self._targets(places)
        origins = self._origins(places, rule == "coupled", laws.adjustments)
        return _decide(laws, origins, tokens, lengths, _RULES[rule], uniforms)

    def _draw(self, laws: _Laws, is_coupled: bool, uniforms: Tensor) -> Tensor:
        origins, tokens, lengths = _nobody(len(laws.scores))
        rule = PICKS if is_coupled else TOKENS
        return _decide(laws, origins, tokens, lengths, rule, (uniforms, uniforms))[:, 1]

    def _alone(self, model: int, places: list[Place]) -> _Laws:
        """What `model` says, of the whole vocabulary."""
        return self._laws(places, [Combination.only(self._num_models, model)] * len(places))

    def _targets(self, places: list[Place]) -> _Laws:
        targets = [
            self._strategies.of(sequence).target(sequence, position)
            for sequence, position in places
        ]
        return self._laws(places, targets)

    def _laws(self, places: list[Place], targets: list[Combination]) -> _Laws:
        shape = len(places), self._num_models
        scores = np.zeros(shape, np.int64)
        scales, shares = np.empty(shape, np.float32), np.empty(shape, np.float32)
        for target, rows, group in _grouped(places, targets):
            for model in target.scorers:
                scores[rows, model] = self._scores.addresses(model, group)
            scales[rows], shares[rows] = _weights(target)
        inverse_temperatures = _inverse_temperatures(places)
        scales *= inverse_temperatures[:, None]
        return _Laws(
            num_columns=self._vocab_size,
            bits=self._bits,
            scores=scores,
            scales=scales,
            shares=shares,
            plausibility=_plausibility(targets),
            limits=_limits(places),
            noises=_noises(places),
            adjustments=self._adjuster.adjustments(places, inverse_temperatures),
        )

    def _origins(
        self, places: list[Place], is_coupled: bool, adjustments: Adjustments | None
    ) -> _Origins:
        numbers = np.zeros((len(places), 4), np.int64)
        scales = _inverse_temperatures(places)
        kept: list[Tensor] = []
        if is_coupled:  # whatever was proposed is right or wrong
            return _Origins(numbers, scales, ())
        for origin, rows, group in _grouped(places, [origin_of(place) for place in places]):
            chosen = range(len(places))[rows] if isinstance(rows, slice) else rows
            allows = partial(_allowed, adjustments, chosen)
            numbers[rows] = self._origin(origin, group, scales[rows], allows, kept)
        return _Origins(numbers, scales, tuple(kept))

    def _origin(
        self,
        origin: Origin,
        places: list[Place],
        scales: Reals,
        allows: Callable[[Tensor], Allowed],
        kept: list[Tensor],
    ) -> Ids:
        """Rows [n, 4]; adds to `kept`."""
        model, is_short = origin
        numbers = np.zeros((len(places), 4), np.int64)
        if model == LOOKUP:
            numbers[:, 0] = CERTAIN
            return numbers
        whole = list(range(len(places)))  # rows that were proposed from the whole vocabulary
        if is_short:
            rows, ids = self._scores.shortlist(model, places)
            numbers[:, 0] = SHORT
            numbers[:, 1] = _addresses(rows)
            numbers[:, 2:] = ids.data_ptr(), len(ids)
            kept += rows, ids
            whole = _empty(rows, scales, allows(ids))
        if whole:
            numbers[whole, 0] = _KINDS[BITS[self._scores.dtype(model)]]
            numbers[whole, 1] = self._scores.addresses(model, [places[row] for row in whole])
        return numbers


def _decide(
    laws: _Laws,
    origins: _Origins,
    tokens: Tensor,
    lengths: list[int],
    rule: int,
    uniforms: tuple[Tensor, Tensor],
) -> Decisions:
    """See `decider`; R rows in windows of `lengths`."""
    is_alone = len(lengths) == 1
    scratch_size = scratch_bytes(laws.num_columns)
    # Of a team any thread may be given something, also where there is less than one for each.
    num_threads = 1 if is_alone else torch.get_num_threads()
    scratch = _scratch(num_threads * scratch_size)
    windows = np.fromiter(accumulate(lengths, initial=0), np.int64, len(lengths) + 1)
    decisions = torch.empty(len(lengths), 2, dtype=torch.int64)
    floors, references = laws.plausibility or (None, None)
    adjustments = laws.adjustments
    kernel = decider()
    arguments = kernel.in_order(
        num_columns=laws.num_columns,
        num_models=laws.scores.shape[1],
        num_windows=len(lengths),
        windows=windows.ctypes.data,
        scores=laws.scores.ctypes.data,
        bits=laws.bits.ctypes.data,
        scales=laws.scales.ctypes.data,
        shares=laws.shares.ctypes.data,
        floors=_address(floors),
        references=_address(references),
        limits=_address(laws.limits),
        noises=_address(laws.noises),
        columns=0 if laws.columns is None else laws.columns.data_ptr(),
        ids=0 if laws.ids is None else laws.ids.data_ptr(),
        masks=0 if adjustments is None else adjustments.masks.ctypes.data,
        starts=0 if adjustments is None else adjustments.starts.ctypes.data,
        changed=0 if adjustments is None else adjustments.changed.ctypes.data,
        changes=0 if adjustments is None else adjustments.changes.ctypes.data,
        origins=origins.numbers.ctypes.data,
        origin_scales=origins.scales.ctypes.data,
        tokens=tokens.data_ptr(),
        accept_uniforms=uniforms[0].data_ptr(),
        choose_uniforms=uniforms[1].data_ptr(),
        rule=rule,
        scratch=scratch.data_ptr(),
        scratch_size=scratch_size,
        decisions=decisions.data_ptr(),
    )
    (kernel.alone if is_alone else kernel)(*arguments)
    return decisions


def _address(array: NDArray[Any] | None) -> int:
    return 0 if array is None else array.ctypes.data


def _grouped(
    places: list[Place], keys: list[Key]
) -> Iterator[tuple[Key, list[int] | slice, list[Place]]]:
    """Places by their keys, each with its row; most often all have the same."""
    if len(set(keys)) == 1:
        yield keys[0], slice(None), places
        return
    for key, rows in grouped(list(range(len(places))), keys.__getitem__):
        yield key, rows, [places[row] for row in rows]


@lru_cache(maxsize=64)
def _nobody(count: int) -> tuple[_Origins, Tensor, list[int]]:
    """Windows of a row each that nobody has proposed anything for; not to be written to."""
    numbers = np.full((count, 4), DRAWN, np.int64)
    origins = _Origins(numbers, np.ones(count, np.float32), ())
    return origins, torch.full((count,), INVALID), [1] * count


def _scratch(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def check() -> None:
    """Compile the kernel, in some seconds, and decide what is known.

    Raises:
        RuntimeError: it decides otherwise.
        Exception: of many kinds, where it cannot be compiled.
    """
    # Of two models' scores each row's sum gives the third token a half and the fourth the rest.
    scores = torch.full((2, _CHECKED), -torch.inf)
    scores[0, 2:4] = scores[1, 2:4] = torch.tensor([0.5, 0.5])
    proposal = torch.zeros(_CHECKED)  # of which the third token is likelier than of the target
    proposal[2] = 30.0
    rows = 3
    laws = _Laws(
        num_columns=_CHECKED,
        bits=np.array([32, 32]),
        scores=np.repeat(_addresses(scores)[None], rows, 0),
        scales=np.ones((rows, 2), np.float32),
        shares=np.zeros((rows, 2), np.float32),
    )
    origins = _Origins(np.zeros((rows, 4), np.int64), np.ones(rows, np.float32), ())
    origins.numbers[:2, 0], origins.numbers[:2, 1] = WIDE, proposal.data_ptr()
    tokens = torch.tensor([2, 2, INVALID])
    uniforms = torch.tensor([0.4, 0.6, 0.0]), torch.tensor([0.3, 0.3, 0.3])
    found = [
        _decide(laws, origins, tokens, lengths, rule, uniforms).tolist()
        for lengths, rule in (([2, 1], TOKENS), ([2, 1], PICKS), ([2], BLOCKS))
    ]
    if found != [[[1, 3], [0, 2]], [[2, 2], [0, 2]], [[0, 3]]]:
        raise RuntimeError(f"decided {found}")
    _check_warped(laws, scores)


def _check_warped(laws: _Laws, scores: Tensor) -> None:
    """As `check`: the same law with a token that is left out or less probable, and with noise."""
    count = len(laws.scores)
    drawn, tokens, lengths = _nobody(count)
    uniforms = torch.full((count,), 0.999)
    noise = exponentials(range(count), [0] * count, _CHECKED, scores.device)
    picked = replace(laws, noises=np.array([(1, *noise_key(seed, 0)) for seed in range(count)]))
    decided = _decide(picked, drawn, tokens, lengths, PICKS, (uniforms, uniforms))
    expected = (2 + noise[:, 2:4].argmin(-1)).tolist()
    scores[0, 3] = 0.4
    limits = np.array([(0.95, 0, 1), (0, 1, 1), (0, 0, 0.5)], np.float32)
    truncated = replace(laws, limits=limits)
    left = _decide(truncated, drawn, tokens, lengths, TOKENS, (uniforms, uniforms))
    bits = np.full((1, padded.py_func(_CHECKED) // 8), 255, np.uint8)
    bits[0, 0] ^= 1 << 2
    adjustments = Adjustments(
        starts=np.array([0, 0, 1, 1]),
        changed=np.array([2]),
        changes=np.array([[2.0, -0.5]], np.float32),
        masks=np.array([bits.ctypes.data, 0, 0]),
        bits=bits,
    )
    adjusted = replace(laws, adjustments=adjustments)
    picks = _decide(adjusted, drawn, tokens, lengths, PICKS, (uniforms, uniforms))
    found = decided[:, 1].tolist(), left[:, 1].tolist(), picks[:, 1].tolist()
    if found != (expected, [2] * count, [3, 3, 2]):
        raise RuntimeError(f"warped, decided {found}")


@lru_cache(maxsize=1024)
def _weights(target: Combination) -> tuple[Reals, Reals]:
    """[K] each: what scores are multiplied with, and shares; see `decider`."""
    weights = np.array(target.weights, np.float32)
    if target.is_logit_level:
        return weights, np.zeros_like(weights)
    if len(target.scorers) == 1:
        return np.ones_like(weights), np.zeros_like(weights)
    # A share of 0 would say that scores are added.
    return np.ones_like(weights), np.where(weights == 0, np.float32(1), weights)


def _plausibility(targets: list[Combination]) -> tuple[Reals, Ids] | None:
    """Floors and references of rows; None where everything is plausible."""
    if not any(target.plausibility > 0 for target in targets):
        return None
    floors = np.array([target.plausibility or 1.0 for target in targets], np.float32)
    references = [target.reference if target.plausibility > 0 else -1 for target in targets]
    return np.log(floors), np.array(references)


def _limits(places: list[Place]) -> Reals | None:
    """[R, NUM_LIMITS]; None where nothing is truncated."""
    params = [sequence.params for sequence, _ in places]
    if not any(p.is_truncated for p in params):
        return None
    none = (0.0, 0, 1.0)
    limits = [(p.min_p, p.top_k, p.top_p) if p.is_truncated else none for p in params]
    return np.array(limits, np.float32)


def _noises(places: list[Place]) -> Ids | None:
    """[R, NOISE] of what is picked; None where no noise has part in it."""
    params = [sequence.params for sequence, _ in places]
    if not any(p.is_seeded and not p.is_greedy for p in params):
        return None
    noises = [
        (0, 0, 0) if p.is_greedy else (1, *noise_key(p.seed, position))
        for p, (_, position) in zip(params, places, strict=True)
    ]
    return np.array(noises, np.int64)


def _padded(ids: Tensor) -> Tensor:
    """As the kernel takes the tokens that columns stand for."""
    return nn.functional.pad(ids.float(), (0, -len(ids) % BLOCK))


def _allowed(adjustments: Adjustments | None, rows: Row[int], ids: Tensor) -> Allowed:
    """Which tokens of a shortlist some rows allow; see `Adjustments.allows`."""
    if adjustments is None:
        return [None] * len(rows)
    return [adjustments.allows(row, ids.numpy()) for row in rows]


def _empty(rows: Tensor, scales: Reals, allowed: Allowed) -> list[int]:
    """Rows of a shortlist that give no token anything: there the whole vocabulary counts."""
    largest = rows.amax(-1).numpy()
    for row, listed in enumerate(allowed):
        if listed is not None:
            largest[row] = rows[row].numpy()[listed].max(initial=-np.inf)
    return np.flatnonzero(~(largest * scales > NOTHING)).tolist()


def _addresses(rows: Tensor) -> Ids:
    """Of dense rows."""
    start = rows.data_ptr()
    return start + np.arange(len(rows)) * (rows.stride(0) * rows.itemsize)


def _inverse_temperatures(places: list[Place]) -> Reals:
    """[R]; of greedy rows 1."""
    temperatures = [sequence.params.temperature or 1.0 for sequence, _ in places]
    return (1 / np.array(temperatures)).astype(np.float32)

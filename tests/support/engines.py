"""Engines over table LMs, and ways to run sequences through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Row
from typing import Any

from server.core.combination import Combination
from server.core.output import TokenDelta
from server.core.sampling_params import DecodingParams, SamplingParams, proposal_lengths
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from tests.support.table_lm import DigitDecoder, TableLM, TableRunner, TableShortlist


def make_engine(
    lms: Row[TableLM],
    *,
    eos: frozenset[int] = frozenset(),
    num_pages: int = 4096,
    on_step: Callable[[StepStats], None] | None = None,
    coin_seed: int = 0,
    shortlists: Row[Row[int] | None] = (),
    **limits: Any,
) -> Engine:
    """`shortlists` [num_models]: ids that a model may propose, or None."""
    runners = [TableRunner(lm, name=f"table-{k}", num_pages=num_pages) for k, lm in enumerate(lms)]
    for runner, ids in zip(runners, shortlists, strict=False):
        if ids is not None:
            runner.deferred = TableShortlist(runner, ids)
    return Engine(
        runners,
        DigitDecoder(),
        eos,
        EngineLimits(**limits),
        on_step=on_step,
        coin_seed=coin_seed,
    )


def make_decoding(
    strategy: str,
    combination: Combination,
    gamma: int | tuple[int, ...] = 3,
    kappa: int = 0,
    shared_coins: bool = False,
    verification: str = "block",
) -> DecodingParams:
    lengths = proposal_lengths(gamma, len(combination.weights))
    return DecodingParams(
        strategy,  # type: ignore[arg-type]
        combination,
        lengths,
        kappa,
        shared_coins,
        verification=verification,  # type: ignore[arg-type]
    )


def run(
    engine: Engine, sequences: Row[Sequence], after_step: Callable[[], None] | None = None
) -> dict[str, list[TokenDelta]]:
    """Decode to the end; deltas by sequence id."""
    deltas: dict[str, list[TokenDelta]] = {sequence.id: [] for sequence in sequences}
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.sequence_id].append(delta)
        if after_step is not None:
            after_step()
    return deltas


def generated(deltas: Row[TokenDelta]) -> tuple[int, ...]:
    return tuple(token for delta in deltas for token in delta.token_ids)


def decode(
    engine: Engine,
    prompt: list[int],
    params: Row[SamplingParams],
    decoding: DecodingParams,
    after_step: Callable[[], None] | None = None,
) -> list[tuple[int, ...]]:
    """Generated tokens for each of `params`, all in one batch."""
    sequences = [Sequence.start(f"s{i}", prompt, each, decoding) for i, each in enumerate(params)]
    deltas = run(engine, sequences, after_step)
    return [generated(deltas[sequence.id]) for sequence in sequences]

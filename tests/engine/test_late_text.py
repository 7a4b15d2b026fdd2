"""Running ahead, text is made and told beside the next forward: when, and that none is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from torch import Tensor

from server.core.combination import Combination
from server.core.output import TokenDelta
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.engine.async_engine import AsyncEngine
from server.engine.decider import Decider
from server.engine.drafted_ids import DraftedIds
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.errors import EngineDead, EngineDraining
from server.runner.base import Batch
from tests.support.engines import generated, make_decoding, make_engine, run
from tests.support.table_lm import DigitDecoder, TableLM, TableRunner

WEIGHTED = Combination.weighted([0.4, 0.6])
COS = make_decoding("cos", WEIGHTED, gamma=3, verification="token")
LMS = [TableLM(70 + k, vocab_size=20) for k in range(2)]


class Noting(TableRunner):
    """Notes its forwards."""

    def __init__(self, lm: TableLM, note: Callable[[str], None]) -> None:
        super().__init__(lm)
        self._note = note

    def forward(self, batch: Batch) -> Tensor:
        self._note("launch")
        return super().forward(batch)


class NotingDecoder(DigitDecoder):
    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        self._note("text")
        return super().decode(ids, skip_special_tokens)


class NotingChooser:
    """Notes what it learns; nothing is left to it to choose."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note

    def choose(self, sequence: Sequence) -> DecodingParams:
        raise AssertionError

    def add(self, sequence: Sequence, model: int, accepted: float) -> None:
        self._note("learnt")

    def lookup_length(self, sequence: Sequence, rate: float, num_found: int) -> int:
        raise AssertionError


def journal(
    monkeypatch: pytest.MonkeyPatch, decoding: DecodingParams, runs_ahead: bool, **params: Any
) -> list[str]:
    """What happened while one text was written; "read" is where the host learnt of its tokens."""
    entries: list[str] = []
    for owner, name in ((DraftedIds, "read_with"), (Decider, "draw")):
        inner = getattr(owner, name)

        def reading(*args: Any, inner: Callable[..., Any] = inner) -> Any:
            result = inner(*args)
            entries.append("read")
            return result

        monkeypatch.setattr(owner, name, reading)
    engine = Engine(
        [Noting(lm, entries.append) for lm in LMS],
        NotingDecoder(entries.append),
        frozenset(),
        EngineLimits(runs_ahead=runs_ahead),
        on_step=lambda step: entries.append("observed"),
    )
    engine._strategies.chooser = NotingChooser(entries.append)
    engine.add(Sequence.start("s", [3, 1], SamplingParams(max_tokens=20, **params), decoding))
    while engine.has_work:
        for deltas in engine.stream_step():
            entries += ["told"] * bool(deltas)
    return entries


def between_reads(entries: list[str]) -> list[list[str]]:
    reads = [i for i, entry in enumerate(entries) if entry == "read"]
    return [entries[start + 1 : stop] for start, stop in pairwise(reads)]


@pytest.mark.parametrize("strategy", ["standard", "speculative", "cos", "single"])
def test_the_next_forward_is_launched_before_text_is_made(
    monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """And told before the host waits again, though every step of `single` waits."""
    only = Combination.only(2, 1) if strategy == "single" else WEIGHTED
    decoding = make_decoding(strategy, only, gamma=(3, 0), verification="token")
    gaps = between_reads(journal(monkeypatch, decoding, runs_ahead=True))
    assert len(gaps) > 4
    for gap in gaps:
        assert gap[0] == "launch"
        assert gap.index("text") < gap.index("observed") < gap.index("told")
    proposes = strategy in ("speculative", "cos")
    assert proposes == any("learnt" in gap for gap in gaps)


@pytest.mark.parametrize("strategy", ["standard", "cos"])
def test_where_a_forward_keeps_the_host_text_comes_before_it(
    monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    decoding = make_decoding(strategy, WEIGHTED, gamma=(3, 0), verification="token")
    for gap in between_reads(journal(monkeypatch, decoding, runs_ahead=False)):
        assert gap[0] == "text"
        assert gap.index("told") < gap.index("launch")


def test_text_that_may_end_the_sequence_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But told as late as any."""
    for gap in between_reads(journal(monkeypatch, COS, runs_ahead=True, stop=("no such",))):
        assert gap[0] == "text"
        assert gap.index("launch") < gap.index("told")


def start(count: int, max_tokens: int = 24, decoding: DecodingParams = COS) -> list[Sequence]:
    """Texts of one prompt, each with an end of its own."""
    requests: tuple[dict[str, Any], ...] = (
        {"provenance": True, "logprobs": 1},
        {"stop": ("5 ", "gh")},
        {"stop_token_ids": frozenset({4, 11})},
        {"temperature": 0.0},
    )
    return [
        Sequence.start(
            f"s{i}",
            [8, 3, 1, 9, 2, 6, 3, 5, 7],
            SamplingParams(max_tokens=max_tokens, seed=i, **requests[i % len(requests)]),
            decoding,
        )
        for i in range(count)
    ]


def test_deltas_are_those_of_telling_at_once() -> None:
    """One by one, with sequences that end in every way, are preempted and find a prefix."""
    told = []
    for runs_ahead in (False, True):
        engine = make_engine(
            LMS,
            eos=frozenset({0}),
            runs_ahead=runs_ahead,
            num_pages=30,
            max_step_tokens=24,
            max_prefill_tokens=9,
        )
        sequences = start(20)
        deltas = run(engine, sequences, engine.scheduler.check_integrity)
        assert sum(sequence.stats.num_preemptions for sequence in sequences) > 3
        assert any(delta.num_cached for each in deltas.values() for delta in each)
        told.append(
            {name: [replace(delta, stats=None) for delta in each] for name, each in deltas.items()}
        )
    assert told[0] == told[1]


def test_who_is_told_of_its_end_is_told_all_that_it_took() -> None:
    engine = make_engine(LMS, runs_ahead=True)
    sequences = {sequence.id: sequence for sequence in start(8)}
    for sequence in sequences.values():
        engine.add(sequence)
    ended = {}
    while engine.has_work:
        for deltas in engine.stream_step():
            for delta in deltas:
                if delta.stats is not None:
                    ended[delta.sequence_id] = replace(delta.stats)
    assert set(ended) == set(sequences)
    for name, stats in ended.items():
        assert stats == sequences[name].stats
        assert stats.decode_seconds > 0


def test_who_is_aborted_is_told_nothing_more_and_others_all() -> None:
    expected = run(make_engine(LMS), start(16))
    for seed in range(4):
        rng = random.Random(seed)
        engine = make_engine(LMS, runs_ahead=True, num_pages=60, max_sequences=9)
        sequences = start(16)
        told: dict[str, list[TokenDelta]] = {sequence.id: [] for sequence in sequences}
        for sequence in sequences:
            engine.add(sequence)
        aborted: set[str] = set()
        while engine.has_work:
            for delta in engine.step():
                assert delta.sequence_id not in aborted
                told[delta.sequence_id].append(delta)
            untold = [s for s in sequences if not (told[s.id] and told[s.id][-1].finish_reason)]
            # The last delta of one that has finished may be on its way.
            victim = rng.choice([s for s in untold if s.is_finished] or sequences)
            if rng.random() < 0.2 and victim in untold:
                engine.abort(victim.id)
                aborted.add(victim.id)
            engine.scheduler.check_integrity()
        for name in set(told) - aborted:
            assert generated(told[name]) == generated(expected[name])
            assert "".join(d.text for d in told[name]) == "".join(d.text for d in expected[name])
            assert [d.finish_reason for d in told[name][:-1]] == [None] * (len(told[name]) - 1)


@pytest.mark.parametrize("others", ["the same model", "another model"])
def test_text_that_fails_ends_its_sequence_wherever_that_is(
    monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    """In flight with the model that the step has launched, or not."""
    model = 1 if others == "another model" else 0
    decodings = [make_decoding("single", Combination.only(2, k)) for k in (0, model)]
    sequences = start(2, decoding=decodings[0])[:1] + start(2, decoding=decodings[1])[1:]
    expected = run(make_engine(LMS), start(2, decoding=decodings[1]))["s1"]
    engine = make_engine(LMS, runs_ahead=True)
    deliver = engine._outputs.deliver

    def failing(sequence: Sequence, *args: Any) -> TokenDelta:
        if sequence.id == "s0" and sequence.num_generated > 6:
            raise ValueError("told to fail")
        return deliver(sequence, *args)

    monkeypatch.setattr(engine._outputs, "deliver", failing)
    faults: list[str] = []
    engine.on_fault = faults.append
    deltas = run(engine, sequences, engine.scheduler.check_integrity)
    assert [delta.finish_reason for delta in deltas["s0"]] == [None] * 6 + ["error"]
    assert generated(deltas["s1"]) == generated(expected)
    assert faults == ["internal"]
    assert engine.scheduler.pages.num_used() == (0, 0)


class Dying(TableRunner):
    def forward(self, batch: Batch) -> Tensor:
        if self.num_forwards > 30:
            raise RuntimeError("cosmic ray")
        return super().forward(batch)


@pytest.mark.anyio
@pytest.mark.parametrize("end", [EngineDead, EngineDraining])
async def test_the_last_engine_step_is_told(end: type[Exception], anyio_backend: str) -> None:
    """Whether the engine fails or is stopped, with text in its hands."""
    runner = Dying if end is EngineDead else TableRunner
    runners = [runner(lm, max_length=2048) for lm in LMS]
    inner = Engine(runners, DigitDecoder(), frozenset(), EngineLimits(runs_ahead=True))
    engine = AsyncEngine(inner)
    sequence = replace(start(1)[0], params=SamplingParams(max_tokens=2000, seed=1))
    told: list[TokenDelta] = []

    async def read() -> None:
        async for deltas in engine.stream([sequence]):
            told.extend(deltas)
            if end is EngineDraining and len(generated(told)) > 20:
                await engine.stop()

    engine.start()
    with pytest.raises(end):
        await read()
    await engine.stop()
    assert len(generated(told)) > 20
    assert list(generated(told)) == sequence.token_ids[sequence.num_prompt : sequence.num_verified]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"

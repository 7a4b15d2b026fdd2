from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from server.core.combination import Combination
from server.core.output import TokenDelta
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.errors import EngineDead, EngineDraining, EngineOverloaded
from tests.support.engines import generated, make_decoding, make_engine, run
from tests.support.table_lm import TableLM

pytestmark = pytest.mark.anyio
DECODING = make_decoding("cos", Combination.weighted([0.5, 0.5]), gamma=3)
LMS = [TableLM(seed=1, vocab_size=20), TableLM(seed=2, vocab_size=20)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def make_sequence(index: int, max_tokens: int = 20) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, seed=index)
    return Sequence.start(f"s{index}", [index % 20, 1], params, DECODING)


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[AsyncEngine]:
    wrapped = AsyncEngine(engine)
    wrapped.start()
    try:
        yield wrapped
    finally:
        await wrapped.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  the engine has no event for this
            await asyncio.sleep(0.002)


async def idle(engine: AsyncEngine, inner: Engine) -> None:
    """Wait until aborts have reached the engine thread."""
    await until(lambda: not inner.has_work and not engine.num_open)


async def collect(engine: AsyncEngine, sequences: list[Sequence]) -> list[TokenDelta]:
    return [delta async for deltas in engine.stream(sequences) for delta in deltas]


async def test_64_concurrent_streams_lose_and_double_nothing() -> None:
    inner = make_engine(LMS, max_sequences=16)
    lengths = [random.Random(i).randint(1, 40) for i in range(64)]
    async with running(inner) as engine:
        streams = [collect(engine, [make_sequence(i, lengths[i])]) for i in range(64)]
        results = await asyncio.gather(*streams)
    for i, deltas in enumerate(results):
        alone = run(make_engine(LMS), [make_sequence(i, lengths[i])])[f"s{i}"]
        assert {delta.sequence_id for delta in deltas} == {f"s{i}"}
        assert generated(deltas) == generated(alone)
        assert "".join(d.text for d in deltas) == "".join(d.text for d in alone)
        assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    inner.scheduler.check_integrity()
    assert inner.scheduler.pages.num_used() == (0, 0)


async def test_aborting_half_frees_their_pages_and_leaves_the_rest_alone() -> None:
    inner = make_engine(LMS, max_sequences=24)

    async def read(engine: AsyncEngine, i: int) -> tuple[int, ...]:
        deltas: list[TokenDelta] = []
        stream = engine.stream([make_sequence(i, 40)])
        async for new in stream:
            deltas += new
            if i % 2 and len(generated(deltas)) > i % 7:
                await stream.aclose()
                break
        return generated(deltas)

    async with running(inner) as engine:
        results = await asyncio.gather(*(read(engine, i) for i in range(64)))
        await idle(engine, inner)
        inner.scheduler.check_integrity()
        assert inner.scheduler.pages.num_used() == (0, 0)
    for i in range(0, 64, 2):
        assert results[i] == generated(run(make_engine(LMS), [make_sequence(i, 40)])[f"s{i}"])


async def test_a_cancelled_reader_aborts_its_sequences() -> None:
    inner = make_engine(LMS)
    async with running(inner) as engine:
        task = asyncio.create_task(collect(engine, [make_sequence(1, 60), make_sequence(2, 60)]))
        await until(lambda: engine.num_open > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(engine, inner)
        inner.scheduler.check_integrity()


async def test_a_request_that_does_not_fit_the_queue_is_refused_whole() -> None:
    inner = make_engine(LMS, max_sequences=2, max_waiting=2)
    async with running(inner) as engine:
        with pytest.raises(EngineOverloaded, match="2 running and 2 waiting"):
            await collect(engine, [make_sequence(i) for i in range(5)])
        assert engine.num_open == 0
        assert len(await collect(engine, [make_sequence(i, 1) for i in range(4)])) == 4


async def test_draining_refuses_new_work_and_finishes_the_old() -> None:
    async with running(make_engine(LMS)) as engine:
        task = asyncio.create_task(collect(engine, [make_sequence(1)]))
        await until(lambda: engine.num_open > 0)
        engine.drain()
        with pytest.raises(EngineDraining):
            await collect(engine, [make_sequence(2)])
        assert len(generated(await task)) == 20


async def test_stopping_ends_open_streams() -> None:
    async with running(make_engine(LMS)) as engine:
        stream = engine.stream([make_sequence(1, 60)])
        await anext(stream)
        await engine.stop()
        with pytest.raises(EngineDraining):
            async for _ in stream:
                pass


@pytest.mark.filterwarnings("default")
async def test_waiting_for_work_is_idle_time() -> None:
    async with running(make_engine(LMS)) as engine:
        await asyncio.sleep(0.05)
        waited = engine.idle_seconds
        assert waited > 0.03, "a wait counts while it lasts"
        sequence = make_sequence(0)
        await collect(engine, [sequence])
        assert engine.idle_seconds >= waited
        assert sequence.stats.first_run is not None


async def test_a_dead_engine_fails_every_client_at_once() -> None:
    class Dying(TableLM):
        def logits(self, prefix):
            if len(prefix) > 10:
                raise RuntimeError("cosmic ray")
            return super().logits(prefix)

    async with running(make_engine([LMS[0], Dying(seed=3, vocab_size=20)])) as engine:
        tasks = [asyncio.create_task(collect(engine, [make_sequence(i)])) for i in range(5)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineDead) for result in results)
        async with asyncio.timeout(5):
            await engine.wait_dead()
        assert "cosmic ray" in str(engine.error)
        assert not engine.is_ready
        with pytest.raises(EngineDead):
            await collect(engine, [make_sequence(9)])

"""Where each model has a GPU of its own, both work at once on half-batches."""

from collections.abc import Callable

import pytest
import torch

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.runner.loader import LoadedModels
from tests.engine.test_controller import make_costs
from tests.support.engines import make_decoding, run
from tests.support.pretended_gpus.tensors import Gpus

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="GPUs are real here, and tell nobody when they were busy"
)
CONTRASTIVE = Combination.contrastive(2, 0.1)
Intervals = list[tuple[float, float]]


def busy(gpus: Gpus, index: int, since: float, until: float) -> Intervals:
    """When a GPU had something to do between these times, in any of its streams."""
    found = sorted(
        (max(begun, since), min(ended, until))
        for stream in gpus.streams
        if stream.index == index
        for begun, ended in stream.busy
        if begun < until and ended > since
    )
    joined: Intervals = found[:1]
    for begun, ended in found[1:]:
        if begun > joined[-1][1]:
            joined.append((begun, ended))
        else:
            joined[-1] = joined[-1][0], max(joined[-1][1], ended)
    return joined


def length(intervals: Intervals) -> float:
    return sum(ended - begun for begun, ended in intervals)


def shared(some: Intervals, others: Intervals) -> float:
    """Seconds that lie in both."""
    return sum(
        max(0.0, min(one[1], other[1]) - max(one[0], other[0])) for one in some for other in others
    )


def run_engine(
    gpus: Gpus, loaded: LoadedModels, decoding: DecodingParams, half_batches: bool
) -> tuple[Intervals, Intervals, float]:
    """When each GPU was busy while four sequences decoded, and how long they did."""
    engine = Engine(
        loaded.runners,
        loaded.tokenizer.backend_tokenizer,
        frozenset(),
        EngineLimits(max_sequences=8, half_batches=half_batches),
    )
    params = [SamplingParams(max_tokens=16, seed=i) for i in range(4)]
    sequences = [Sequence.start(str(i), [5 + i, 9], p, decoding) for i, p in enumerate(params)]
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work and not all(sequence.num_generated for sequence in sequences):
        engine.step()
    gpus.synchronize()
    since = gpus.host.seconds
    while len(engine.scheduler.running) == len(sequences):
        engine.step()
    seconds = gpus.host.seconds - since
    while engine.has_work:
        engine.step()
    first, second = (busy(gpus, index, since, since + seconds) for index in (0, 1))
    return first, second, seconds


@pytest.mark.parametrize("name", ["standard", "cos"])
def test_both_work_at_once(gpus: Gpus, load: Callable[..., LoadedModels], name: str) -> None:
    loaded = load("cuda:0", "cuda:1", attention="portable")
    decoding = make_decoding(name, CONTRASTIVE, (3, 2), verification="token")
    first, second, _ = run_engine(gpus, loaded, decoding, half_batches=False)
    assert shared(first, second) == 0
    first, second, seconds = run_engine(gpus, loaded, decoding, half_batches=True)
    assert shared(first, second) > 0.75 * length(second)
    # Who has more to do has hardly anything to wait for.
    assert length(first) > 0.9 * seconds


@pytest.mark.parametrize("pays", [True, False])
def test_auto_divides_where_it_pays(load: Callable[..., LoadedModels], pays: bool) -> None:
    """By the cost table: forwards that cost by rows, or the same whatever they are over."""
    loaded = load("cuda:0", "cuda:1", attention="portable")
    steps: list[StepStats] = []
    engine = Engine(
        loaded.runners,
        loaded.tokenizer.backend_tokenizer,
        frozenset(),
        EngineLimits(max_sequences=8),
        on_step=steps.append,
    )
    each = (0.0, 0.0, 1.0) if pays else (1.0, 0.0, 0.0)
    engine.control(make_costs(each, each))
    decoding = make_decoding("standard", CONTRASTIVE)
    params = SamplingParams(max_tokens=20, temperature=0.0)
    run(engine, [Sequence.start(str(i), [5 + i, 9], params, decoding) for i in range(4)])
    assert (sum(step.overlaps for step in steps) > 10) == pays
    assert any(step.overlaps for step in steps) == pays

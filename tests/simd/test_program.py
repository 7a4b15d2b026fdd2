"""Kernels that run one after the other see what those before them have done."""

import pytest
import torch

from server.simd import support
from tests.support.threads import threads

if reason := support.missing():
    pytest.skip(f"the kernels cannot run here: {reason}", allow_module_level=True)

from numba import njit

from server.simd.kernel import Kernel, part
from server.simd.program import Later, Program
from server.simd.vectors import load_number, load_whole, store_number, store_whole

SIZE = 10_000


@njit
def shift(a, thread, num_threads):
    """Every number becomes its neighbour's plus a step: others' parts are read."""
    first, end = part(a.size, thread, num_threads)
    for place in range(first, end):
        number = load_whole(a.source + (place + 1) % a.size * 8)
        store_whole(a.target + place * 8, number + a.step)


@njit
def scale(a, thread, num_threads):
    first, end = part(a.size, thread, num_threads)
    for place in range(first, end):
        store_number(a.x + place * 4, load_number(a.x + place * 4) * a.factor)


SHIFT = Kernel(shift, {"source": "q", "target": "q", "size": "q", "step": "q"})
SCALE = Kernel(scale, {"x": "q", "size": "q", "factor": "d"})


@pytest.fixture(params=[1, 2, 3])
def _threads(request):
    with threads(request.param):
        yield


@pytest.mark.usefixtures("_threads")
def test_each_waits_for_the_one_before():
    program = Program()
    first, second = Later("first"), Later("second")
    for _ in range(50):
        program.add(SHIFT, source=first, target=second, size=SIZE, step=Later("step"))
        program.add(SHIFT, source=second, target=first, size=SIZE, step=1)
    for step in (1, 4, 4):
        numbers, room = torch.arange(SIZE), torch.empty(SIZE, dtype=torch.int64)
        program.run(first=numbers.data_ptr(), second=room.data_ptr(), step=step)
        assert torch.equal(numbers, torch.arange(SIZE).roll(-100) + 50 * (step + 1))


@pytest.mark.usefixtures("_threads")
def test_a_thread_that_does_not_wait_sees_its_own_part():
    program = Program()
    x = torch.ones(SIZE)
    for index in range(10):
        waits = index == 9
        program.add(SCALE, waits=waits, x=x.data_ptr(), size=Later("size"), factor=-1.5)
    program.run(size=SIZE - 3)
    assert torch.equal(x, torch.tensor([1.5**10] * (SIZE - 3) + [1.0] * 3))


def test_offsets_and_what_is_added_later():
    program = Program()
    x = torch.ones(4)
    program.add(SCALE, x=Later("x", 8), size=1, factor=3.0)
    program.run(x=x.data_ptr(), nothing=5)
    program.add(SCALE, x=Later("x", 4), size=1, factor=5.0)
    program.run(x=x.data_ptr())
    assert x.tolist() == [1.0, 5.0, 9.0, 1.0]


def test_what_is_missing_is_named():
    program = Program()
    program.add(SCALE, x=Later("x"), size=Later("size"), factor=1.0)
    with pytest.raises(KeyError, match="size"):
        program.run(x=torch.ones(1).data_ptr())
    with pytest.raises(AssertionError, match="a kernel takes what it names"):
        program.add(SCALE, x=Later("x"), factor=1.0)
    with pytest.raises(AssertionError, match="only whole numbers"):
        program.add(SCALE, x=Later("x"), size=1, factor=Later("size"))

"""What pretended GPUs find: mistakes that a GPU punishes now and then are punished always."""

import math

import pytest
import torch

from server.cache.kv_store import KVStore
from server.cache.on_device import tensor_on
from server.runner.plan import SpanGroup
from server.runner.style import Style
from tests.support.pretended_gpus.tensors import DeviceTensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs are real here")
CUDA = torch.device("cuda")


def test_devices_do_not_mix():
    here, there = torch.ones(2), torch.ones(2, device="cuda:0")
    for other in (here, torch.ones(2, device="cuda:1")):
        with pytest.raises(RuntimeError, match="same device"):
            there + other
    assert (there + torch.tensor(1.0) + 1).tolist() == [3.0, 3.0]
    assert (there + here.to(there.device)).tolist() == [2.0, 2.0]


def test_nothing_is_done_before_it_is_waited_for(gpus):
    tripled = torch.ones(2, device="cuda") * 3
    assert isinstance(tripled, DeviceTensor)
    assert torch.isnan(tripled.memory).all()
    waits = gpus.num_waits
    assert tripled.tolist() == [3.0, 3.0]
    assert float(tripled[0]) == 3.0
    assert gpus.num_waits == waits + 2


def test_numbers_of_the_host_are_waited_for_where_places_are_tensors(gpus):
    there, places = torch.ones(3, device="cuda"), tensor_on(CUDA, [0, 2])
    waits = gpus.num_waits
    there[1:2] = 5.0
    there[places] = there.new_full((), 6.0)
    assert gpus.num_waits == waits
    there[places] = 7.0
    assert gpus.num_waits == waits + 1
    assert there.tolist() == [7.0, 5.0, 7.0]


def test_copies_to_the_host_come_when_it_waits():
    late = torch.ones(2, device="cuda").to("cpu", non_blocking=True)
    assert math.isnan(late[0])
    torch.cuda.synchronize()
    assert late.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("is_pinned", "found"), [(True, 7.0), (False, 1.0)])
def test_pinned_memory_is_read_late(is_pinned, found):
    host = torch.ones(2, pin_memory=is_pinned)
    there = host.to("cuda", non_blocking=True)
    host.fill_(7)
    assert there.tolist() == [found, found]


def test_what_is_sent_is_not_written_again(gpus):
    waits = gpus.num_waits
    sent = tensor_on(CUDA, [1, 2])
    assert gpus.num_waits == waits
    assert sent.tolist() == [1, 2]


@pytest.mark.parametrize("waits", [True, False])
def test_streams_know_nothing_of_each_other(waits):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        made = torch.ones(2, device="cuda") * 3
    if waits:
        torch.cuda.current_stream().wait_stream(stream)
    assert ((made + 1).tolist() == [4.0, 4.0]) is waits
    stream.synchronize()


def test_copies_between_gpus_follow_both():
    first = torch.ones(2, device="cuda:0") * 3
    second = (first.to("cuda:1") * 2).to("cuda:0")
    assert second.tolist() == [6.0, 6.0]


def test_events_measure():
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.ones(2, device="cuda").add_(1)
    stop.record()
    assert not stop.query()
    stop.synchronize()
    assert start.query()
    assert start.elapsed_time(stop) > 0


def captured(compute, pool):
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = compute()
    return graph, result


def test_graphs_repeat_what_was_captured():
    given, factor = torch.ones(2, device="cuda"), 3.0
    graph, result = captured(lambda: given * factor, torch.cuda.graph_pool_handle())
    given.fill_(5)
    factor = 100.0
    assert torch.isnan(torch.tensor(result.tolist())).all(), "a capture does nothing"
    graph.replay()
    assert result.tolist() == [15.0, 15.0]


def test_graphs_of_a_pool_share_memory():
    pool, given = torch.cuda.graph_pool_handle(), torch.ones(2, device="cuda")
    graph, result = captured(lambda: given * 3, pool)
    other, _ = captured(lambda: given * 4, pool)
    graph.replay()
    other.replay()
    assert all(map(math.isnan, result.tolist()))


def test_waiting_cannot_be_captured():
    given = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="capturing"):
        captured(lambda: given.tolist(), torch.cuda.graph_pool_handle())


def test_waiting_is_told_or_refused():
    given = torch.ones(2, device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="synchronizing"):
            given[given > 0]
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchronizing"):
            given.nonzero()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_run_where_their_tensors_are():
    from server.runner import triton_attention  # here is Triton, which is not everywhere

    there = torch.device("cuda:1")
    store = KVStore(3, 4)
    numbers = torch.ones(1, 1, 16, device=there)
    store.write(0, torch.tensor([4], device=there), numbers, numbers)
    group = SpanGroup(slice(0, 1), 1, 4, there, [1], [[1]])
    style = Style(None, 0, None, None)

    def attend():
        return triton_attention.attend_group(group, numbers, store, 0, style)

    with pytest.raises(RuntimeError, match="cannot reach"):
        attend()
    with torch.cuda.device(there):
        assert attend().tolist() == numbers.tolist()


@pytest.mark.parametrize("is_recorded", [True, False])
def test_memory_is_used_anew_once_nobody_keeps_it(is_recorded):
    """By the stream it was made in, which knows of others only what it is told."""
    stream = torch.cuda.Stream()
    made = torch.ones(2, device="cuda") * 3
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        doubled = made * 2
    if is_recorded:
        made.record_stream(stream)
    del made
    torch.cuda.current_stream().synchronize()
    stream.synchronize()
    assert (doubled.tolist() == [6.0, 6.0]) is is_recorded


@pytest.mark.parametrize("is_first", [True, False])
def test_copies_from_the_first_stream_of_a_gpu_keep_all_streams_of_both(gpus, is_first):
    other, beside = gpus.new_stream("cuda:0"), gpus.new_stream("cuda:1")
    made = torch.ones(2, device="cuda:0")
    other.wait_stream(torch.cuda.current_stream("cuda:0"))
    with torch.cuda.stream(torch.cuda.current_stream("cuda:0") if is_first else other):
        for _ in range(9):
            made = made * 2
        made.to("cuda:1")
    with torch.cuda.stream(beside):
        torch.ones(2, device="cuda:1")
    gpus.synchronize()
    copies = gpus.streams[0] if is_first else other
    assert (beside.busy[0][0] >= copies.busy[-1][1]) is is_first


def test_graphs_are_replayed_on_their_own_gpu(gpus):
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream("cuda:1")
    given = torch.zeros(2, device="cuda:1")
    with torch.cuda.graph(
        graph, pool=torch.cuda.graph_pool_handle(), stream=stream, capture_error_mode="relaxed"
    ):
        taken = given + 1
    given.fill_(6)
    with torch.cuda.device("cuda:0"):
        graph.replay()
    assert taken.tolist() == [7.0, 7.0]

"""The CPU's attention kernels against the portable path."""

import pytest
import torch

from server.cache.kv_store import KVStore
from server.runner.style import Style
from server.simd import support
from tests.support import attention_cases
from tests.support.attention_cases import PLAIN, spoil_others
from tests.support.threads import threads

if reason := support.missing():
    pytest.skip(f"the kernels cannot run here: {reason}", allow_module_level=True)

from server.runner import simd_attention as kernels

CPU = torch.device("cpu")


def make_case(*arguments):
    return attention_cases.make_case(*arguments, device=CPU)


def assert_same(case, style=PLAIN):
    attention_cases.assert_same(kernels, case, style)


@pytest.fixture(params=[1, 2, 3])
def _threads(request):
    with threads(request.param):
        yield


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "lengths"),
    [(1, [1]), (1, [150, 3]), (2, [65, 2]), (5, [5, 128, 129]), (16, [16, 300, 40])],
)
def test_same_as_portable(num_tokens, lengths, dtype):
    assert_same(make_case(num_tokens, lengths, 16, 6, 3, 64, dtype))


@pytest.mark.parametrize("page_size", [1, 4, 24, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 1)])
def test_page_sizes_and_groups(page_size, heads, kv_heads):
    assert_same(make_case(3, [70, 31], page_size, heads, kv_heads, 64, torch.float32))


@pytest.mark.parametrize("num_tokens", range(1, 17))
def test_every_query_length(num_tokens):
    lengths = [num_tokens, num_tokens + 1, 100, 140]
    assert_same(make_case(num_tokens, lengths, 16, 4, 2, 64, torch.float32))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("num_tokens", [17, 32, 40, 130])
def test_long_spans(num_tokens):
    """As prompts are read: from their beginning, or after tokens read before."""
    lengths = [num_tokens, num_tokens + 1, num_tokens + 150]
    for style in (PLAIN, Style(None, 50, None, None)):
        assert_same(make_case(num_tokens, lengths, 16, 6, 3, 64, torch.float32), style)


@pytest.mark.parametrize("window", [1, 17, 33, 128, 129, 1000])
def test_windows(window):
    for num_tokens in (1, 5):
        case = make_case(num_tokens, [150, 9, 400], 4, 4, 2, 64, torch.float32)
        assert_same(case, Style(0.3, window, None, None))


@pytest.mark.parametrize(("dim", "value_dim"), [(8, 8), (96, 64), (256, 256)])
def test_other_head_dimensions(dim, value_dim):
    assert_same(make_case(2, [70], 16, 4, 2, dim, torch.float32, value_dim))


def test_large_scores():
    """Weights of keys that are far below the largest vanish, and nothing overflows."""
    case = make_case(3, [200, 90], 16, 4, 2, 64, torch.float32)
    assert_same(case, Style(20.0, 0, None, None))


def test_what_lies_in_other_slots_does_not_matter():
    case = make_case(3, [3, 40, 150], 16, 4, 2, 64, torch.float32)
    (group,), queries, store = case
    for style in (PLAIN, Style(None, 20, None, None)):
        clean = kernels.attend_group(group, queries, store, 0, style)
        spoil_others(case)
        assert torch.equal(kernels.attend_group(group, queries, store, 0, style), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_finds_the_same_whatever_is_attended_beside_it(dtype):
    """To the last bit: among other spans, in a longer span, and by any number of threads."""
    (group,), queries, store = make_case(5, [5, 150, 131, 290], 16, 6, 3, 64, dtype)
    together = kernels.attend_group(group, queries, store, 0, PLAIN)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(kernels.attend_group(group, queries, store, 0, PLAIN), together)
    torch.set_num_threads(before)
    for number, length in enumerate(group.lengths):
        for token in range(5):
            (alone,), _, _ = make_case(1, [length - 4 + token], 16, 6, 3, 64, dtype)
            alone.pages = [group.pages[number]]
            row = number * 5 + token
            found = kernels.attend_group(alone, queries[row : row + 1], store, 0, PLAIN)
            assert torch.equal(found[0], together[row])


def test_a_token_of_a_long_span_finds_the_same_as_alone():
    (group,), queries, store = make_case(70, [270], 16, 6, 3, 64, torch.float32)
    within = kernels.attend_group(group, queries, store, 0, PLAIN)
    for token in (0, 15, 16, 40, 69):
        (alone,), _, _ = make_case(1, [201 + token], 16, 6, 3, 64, torch.float32)
        alone.pages = group.pages
        found = kernels.attend_group(alone, queries[token : token + 1], store, 0, PLAIN)
        assert torch.equal(found[0], within[token])


def test_what_they_leave_to_torch():
    (group,), queries, store = make_case(4, [100], 16, 4, 2, 64, torch.float32)
    assert kernels.supports(group, queries, store, 0, PLAIN)
    assert not kernels.supports(group, queries, store, 0, Style(None, 0, 5.0, None))
    assert not kernels.supports(group, queries, store, 0, Style(None, 0, None, torch.zeros(4)))
    assert not kernels.supports(group, queries.half(), store, 0, PLAIN)
    (group,), queries, store = make_case(1, [9], 16, 4, 2, 272, torch.float32)
    assert not kernels.supports(group, queries, store, 0, PLAIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim", "value_dim"), [(3, 64, 64), (1, 8, 24), (2, 3, 5)])
def test_writing(heads, dim, value_dim, dtype):
    """Rows with something between them, as they lie among queries, go where torch puts them."""
    plain, ours = KVStore(8, 4), KVStore(8, 4)
    for count in (5, 1, 0):
        slots = torch.randperm(31)[:count] + 1
        keys = torch.randn(count, 3 * heads, dim).to(dtype)[:, heads : 2 * heads]
        values = torch.randn(count, heads, value_dim).to(dtype)
        if count:
            plain.write(0, slots, keys, values)
            kernels.write(ours, 0, slots, keys, values)
    for memory, expected in zip(ours.slots(0), plain.slots(0), strict=True):
        assert torch.equal(memory, expected)

"""The arithmetic behind every figure, on numbers small enough to do by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.bench.closed_loop import BlockResult
from server.bench.reading import Reading
from server.bench.report import cells
from server.bench.row import Row
from server.bench.summary import quantile, summarise


def make_row(index: int = 0, gaps=((0.2, 2), (0.1, 1)), **changes) -> Row:
    row = {
        "prompt_set": "toy",
        "concurrency": 1,
        "strategy": "standard",
        "round": 0,
        "index": index,
        "seed": index,
        "ttft": 0.5,
        "num_tokens": 1 + sum(count for _, count in gaps),
        "first_tokens": 1,
        "gaps": list(gaps),
    }
    return Row(**{**row, **changes})


def make_block(strategy: str, round: int, seconds: float, *rows: Row) -> BlockResult:
    return BlockResult("toy", 1, strategy, round, seconds, rows)


def test_quantile_is_nearest_rank_over_counts():
    values = [(3.0, 1), (1.0, 8), (2.0, 1)]
    assert quantile(values, 0.5) == 1.0
    assert quantile(values, 0.8) == 1.0
    assert quantile(values, 0.9) == 2.0
    assert quantile(values, 0.99) == 3.0
    assert quantile([], 0.5) is None


def test_a_chunk_of_several_tokens_counts_once_for_each():
    rows = [make_row(gaps=((0.4, 4), (0.5, 1)))]
    [summary] = summarise([make_block("standard", 0, 1.0, *rows)])
    assert summary.token_p50 == pytest.approx(0.1)  # four tokens of 0.1 s, one of 0.5 s
    assert summary.token_p99 == pytest.approx(0.5)


def test_ratio_is_a_ratio_of_sums_with_the_spread_of_its_rounds():
    blocks = [
        make_block("standard", 0, 4.0, make_row()),
        make_block("cos", 0, 1.0, make_row()),
        make_block("standard", 1, 6.0, make_row()),
        make_block("cos", 1, 3.0, make_row()),
    ]
    standard, cos = summarise(blocks)
    assert cos.ratio == pytest.approx(10 / 4)
    assert (cos.ratio_low, cos.ratio_high) == pytest.approx((2.0, 4.0))
    assert (standard.ratio, standard.ratio_low, standard.ratio_high) == (1.0, 1.0, 1.0)


def test_slower_than_standard_reads_below_one():
    blocks = [make_block("standard", 0, 1.0, make_row()), make_block("cos", 0, 2.0, make_row())]
    assert summarise(blocks)[1].ratio == pytest.approx(0.5)


def test_unequal_lengths_are_compared_by_the_token():
    short, long = make_row(gaps=((0.1, 1),)), make_row(gaps=((0.3, 3),))
    blocks = [make_block("standard", 0, 2.0, short), make_block("cos", 0, 2.0, long)]
    assert summarise(blocks)[1].ratio == pytest.approx(2.0)  # 2 s for 2 tokens, 2 s for 4


def test_decode_ratio_leaves_the_first_chunk_out():
    slow, fast = make_row(gaps=((0.9, 3),), ttft=9.0), make_row(gaps=((0.3, 3),), ttft=9.0)
    blocks = [make_block("standard", 0, 9.9, slow), make_block("cos", 0, 9.3, fast)]
    assert summarise(blocks)[1].decode_ratio == pytest.approx(3.0)


def test_engine_ratio_is_of_its_own_seconds_for_the_same_tokens():
    def blocks(*readings):
        return [
            replace(make_block(name, 0, 9.0, make_row(gaps=((0.9, 3),))), reading=reading)
            for name, reading in zip(("standard", "cos"), readings, strict=True)
        ]

    ratio = summarise(blocks(Reading(1.0, 1.2), Reading(1.0, 0.8)))[1].engine_ratio
    assert ratio == pytest.approx(1.5)
    assert summarise(blocks(Reading(1.0, 1.2), None))[1].engine_ratio is None


def test_no_ratio_without_a_baseline_or_with_failures():
    assert summarise([make_block("cos", 0, 1.0, make_row())])[0].ratio is None
    failed = make_row(error="HTTP 500")
    blocks = [make_block("standard", 0, 1.0, failed), make_block("cos", 0, 1.0, make_row())]
    standard, cos = summarise(blocks)
    assert (standard.ratio, cos.ratio, cos.decode_ratio) == (None, None, None)
    assert cos.engine_ratio is None
    assert (standard.num_errors, cos.num_errors) == (1, 0)


def test_acceptance_and_tokens_per_forward_by_model():
    reports = [
        {"proposed": [4, 0], "accepted": [3, 0], "forwards": [4, 1]},
        {"proposed": [4, 0], "accepted": [1, 0], "forwards": [4, 3]},
    ]
    rows = [make_row(index, cos=report) for index, report in enumerate(reports)]
    [summary] = summarise([make_block("cos", 0, 1.0, *rows)])
    assert summary.acceptance == [0.5, None]
    assert summary.tokens_per_forward == [1.0, 2.0]  # 8 tokens in 8 and in 4 forwards


def test_what_auto_took_is_told():
    reports = [{"strategies": {"cos": 6, "standard": 2}}, {"strategies": {"cos": 8}}]
    rows = [make_row(index, cos=report) for index, report in enumerate(reports)]
    [summary] = summarise([make_block("auto", 0, 1.0, *rows)])
    assert summary.used == {"cos": 14 / 16, "standard": 2 / 16}
    assert cells(summary)[2] == "auto → cos 88% standard 12%"
    [fixed] = summarise([make_block("cos", 0, 1.0, *rows)])
    assert cells(fixed)[2] == "cos"


def test_points_are_kept_apart():
    blocks = [
        make_block("standard", 0, 1.0, make_row()),
        BlockResult("toy", 4, "standard", 0, 1.0, (make_row(),)),
        BlockResult("other", 1, "standard", 0, 1.0, (make_row(),)),
    ]
    points = [(each.prompt_set, each.concurrency) for each in summarise(blocks)]
    assert points == [("toy", 1), ("toy", 4), ("other", 1)]

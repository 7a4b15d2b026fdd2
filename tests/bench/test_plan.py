"""Order of requests: same prompts and seeds for every strategy, interleaved, rotated."""

from __future__ import annotations

from collections import defaultdict

from server.bench.plan import Job, make_jobs, plan, rotated
from server.bench.prompts import PromptSet
from server.bench.settings import Settings
from server.bench.strategy_spec import parse_strategies

PROMPTS = PromptSet("toy", tuple("abcdefg"))


def make_settings(**changes) -> Settings:
    settings = {
        "prompt_sets": (PROMPTS,),
        "strategies": parse_strategies("standard,cos,mixture", None),
        "concurrency": (1, 4),
        "num_prompts": 7,
        "rounds": 3,
        "max_tokens": 32,
        "temperature": 1.0,
        "seed": 100,
        "ignore_eos": True,
        "warmup": 1,
    }
    return Settings(**{**settings, **changes})


def test_every_strategy_runs_the_same_jobs_in_every_round():
    by_round = defaultdict(set)
    for block in plan(make_settings()):
        by_round[block.concurrency, block.round].add(block.jobs)
    assert len(by_round) == 2 * (3 + 1)
    assert all(len(jobs) == 1 for jobs in by_round.values())


def test_rounds_together_send_each_job_once():
    blocks = [block for block in plan(make_settings()) if not block.is_warmup]
    sent = [
        job
        for block in blocks
        if block.concurrency == 4 and block.strategy.label == "cos"
        for job in block.jobs
    ]
    assert sorted(job.index for job in sent) == list(range(7))
    assert all(job.seed == 100 + job.index for job in sent)


def test_a_round_is_finished_before_the_next_and_orders_rotate():
    blocks = [block for block in plan(make_settings(concurrency=(1,))) if not block.is_warmup]
    assert [(block.round, block.strategy.label) for block in blocks] == [
        (0, "standard"),
        (0, "cos"),
        (0, "mixture"),
        (1, "cos"),
        (1, "mixture"),
        (1, "standard"),
        (2, "mixture"),
        (2, "standard"),
        (2, "cos"),
    ]


def test_each_strategy_comes_first_equally_often():
    strategies = parse_strategies("standard,cos,mixture", None)
    firsts = [rotated(strategies, round)[0].label for round in range(6)]
    assert sorted(firsts) == ["cos"] * 2 + ["mixture"] * 2 + ["standard"] * 2


def test_warmup_comes_first_and_shares_no_seed_with_what_counts():
    blocks = plan(make_settings(concurrency=(4,)))
    warmup, counted = blocks[:3], blocks[3:]
    assert all(block.is_warmup and len(block.jobs) == 4 for block in warmup)
    assert not any(block.is_warmup for block in counted)
    seeds = {job.seed for block in counted for job in block.jobs}
    assert not seeds & {job.seed for block in warmup for job in block.jobs}
    assert all(job.max_tokens == 16 for block in warmup for job in block.jobs)


def test_no_warmup():
    assert not any(block.is_warmup for block in plan(make_settings(warmup=0)))


def test_a_short_file_is_used_again_with_other_seeds():
    jobs = make_jobs(PromptSet("two", ("a", "b")), 3, seed=5, max_tokens=9)
    assert jobs == (Job("a", 0, 5, 9), Job("b", 1, 6, 9), Job("a", 2, 7, 9))

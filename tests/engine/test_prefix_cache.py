"""Texts are the same whatever the prefix cache holds, and prompts are read once."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from server.cache.page_pool import PagePool
from server.cache.page_table import PageTable
from server.cache.prefix_keys import PrefixKeys
from server.core.combination import Combination
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence, Status
from server.core.stats import StepStats
from server.engine.engine import Engine
from server.engine.sequence_pages import SequencePages
from tests.support.engines import generated, make_decoding, make_engine, run
from tests.support.table_lm import TableLM

WEIGHTED = Combination.weighted([0.4, 0.6])
EXPERT_ONLY = Combination.only(2, 1)
DECODINGS = {
    "standard": make_decoding("standard", WEIGHTED),
    "speculative": make_decoding("speculative", WEIGHTED, gamma=4),
    "plain": make_decoding("speculative", EXPERT_ONLY, gamma=4),
    "cos": make_decoding("cos", WEIGHTED, gamma=(3, 2)),
    "contrastive": make_decoding("cos", Combination.contrastive(2, 0.3), gamma=3),
    "mixture": make_decoding("mixture", WEIGHTED, gamma=4, kappa=2),
    "three": make_decoding("cos", Combination.weighted([0.3, 0.3, 0.4]), gamma=(3, 2, 1)),
}
SYSTEM = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]


LMS = [TableLM(seed=70 + k, vocab_size=20) for k in range(3)]


def new_engine(name: str = "cos", steps: list[StepStats] | None = None, **options: Any) -> Engine:
    lms = LMS[: len(DECODINGS[name].gamma)]
    return make_engine(lms, on_step=steps.append if steps is not None else None, **options)


def start(id: str, prompt: list[int], name: str = "cos", **params: Any) -> Sequence:
    settings = SamplingParams(**{"max_tokens": 12, "seed": 5, **params})
    return Sequence.start(id, prompt, settings, DECODINGS[name])


def text(engine: Engine, sequence: Sequence) -> tuple[int, ...]:
    deltas = run(engine, [sequence], engine.scheduler.check_integrity)
    return generated(deltas[sequence.id])


def num_prefilled(steps: list[StepStats]) -> int:
    return sum(step.num_prefill_tokens for step in steps)


def num_cached(steps: list[StepStats]) -> list[int]:
    counts = [step.num_cached for step in steps if step.num_cached]
    return [sum(each) for each in zip(*counts, strict=True)]


@pytest.mark.parametrize("name", DECODINGS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_second_request_reads_only_what_is_new(name: str, temperature: float) -> None:
    steps: list[StepStats] = []
    engine = new_engine(name, steps)
    prompt = [*SYSTEM, 7, 7]
    first = text(engine, start("first", prompt, name, temperature=temperature))
    before = num_prefilled(steps)
    steps.clear()
    assert text(engine, start("again", prompt, name, temperature=temperature)) == first
    # Of 15 tokens, 12 fill whole pages of 4.
    assert before - num_prefilled(steps) == sum(num_cached(steps)) > 0
    assert set(num_cached(steps)) <= {0, 12}


@pytest.mark.parametrize("name", ["standard", "cos"])
def test_a_chat_finds_its_earlier_turns(name: str) -> None:
    """What was generated is found too, and the next turn reads on behind it."""
    steps: list[StepStats] = []
    engine, plain = new_engine(name, steps), new_engine(name, prefix_cache=False)
    prompt = [*SYSTEM]
    for turn in range(3):
        steps.clear()
        answer = text(engine, start(f"turn-{turn}", prompt, name))
        assert answer == text(plain, start(f"turn-{turn}", prompt, name))
        # The last token of an answer is verified, but no model needs to have seen it.
        expected = (len(prompt) - 4) // 4 * 4 if turn else 0
        assert all(count >= expected - 4 for count in num_cached(steps))
        prompt += [*answer, 2, 7, 1]


def test_requests_that_come_together_read_their_common_prompt_once() -> None:
    steps: list[StepStats] = []
    engine = new_engine("cos", steps)
    prompt = [1, 2, 3] * 10
    sequences = [start(f"s{i}", [*prompt, i], seed=i) for i in range(6)]
    deltas = run(engine, sequences, engine.scheduler.check_integrity)
    # 31 tokens each and 28 of them in whole pages that only the first one fills.
    assert num_prefilled(steps) == 2 * (31 + 5 * 3)
    assert [deltas[s.id][-1].num_cached for s in sequences] == [0, *[28] * 5]
    alone = [
        text(new_engine(), start(s.id, s.token_ids[:31], seed=i)) for i, s in enumerate(sequences)
    ]
    assert [generated(deltas[s.id]) for s in sequences] == alone


def test_a_reader_that_leaves_is_not_waited_for() -> None:
    engine = new_engine(max_step_tokens=10)
    prompt = [1, 2, 3] * 10
    expected = text(new_engine(), start("s", prompt))
    leader, follower = start("leader", prompt), start("follower", prompt)
    engine.add(leader)
    engine.add(follower)
    engine.step()
    engine.abort("leader")
    made: list[int] = []
    while engine.has_work:
        for delta in engine.step():
            made += delta.token_ids
        engine.scheduler.check_integrity()
    assert tuple(made) == expected


def test_salts_and_refusals_find_nothing() -> None:
    steps: list[StepStats] = []
    engine = new_engine("cos", steps)
    salts: list[dict[str, Any]] = [{"cache_salt": "a"}, {}, {"cache_salt": "b"}]
    for number, params in enumerate([*salts, {"prefix_cache": False}]):
        text(engine, start(f"s{number}", SYSTEM, **params))
    assert sum(num_cached(steps)) == 0
    text(engine, start("same", SYSTEM, cache_salt="b"))
    assert num_cached(steps) == [12, 12]


def test_a_request_that_allows_no_token_costs_others_nothing() -> None:
    """It ends at its first token, and what it found of their prompt stays to be found."""
    steps: list[StepStats] = []
    engine = new_engine(steps=steps)
    prompt = [*SYSTEM, 7, 7]
    first = text(engine, start("first", prompt))
    for number in range(2):
        nothing = start(f"nothing{number}", prompt, allowed_token_ids=(3,), bad_words=((3,),))
        [*_, last] = run(engine, [nothing], engine.scheduler.check_integrity)[nothing.id]
        assert last.finish_reason == "error"
    steps.clear()
    assert text(engine, start("again", prompt)) == first
    assert num_cached(steps) == [12, 12]


def test_what_is_found_after_a_preemption_is_no_part_of_what_a_request_was_spared() -> None:
    """It finds what it has computed itself."""
    steps: list[StepStats] = []
    engine = new_engine("cos", steps)
    sequence = start("s", SYSTEM)
    engine.add(sequence)
    while not sequence.num_generated:
        engine.step()
    engine.scheduler._preempt(sequence)
    while engine.has_work:
        engine.step()
    assert num_cached(steps) == [12, 12]
    assert sequence.stats.cached == [0, 0]


def test_what_one_of_its_models_had_to_read_was_not_spared_a_request() -> None:
    engine = new_engine()
    decoding = make_decoding("single", EXPERT_ONLY)
    for id, each, spared in (
        ("first", decoding, [0, 0]),
        ("alone", decoding, [0, 12]),
        ("both", DECODINGS["cos"], [0, 12]),
        ("again", DECODINGS["cos"], [12, 12]),
    ):
        sequence = Sequence.start(id, SYSTEM, SamplingParams(max_tokens=3, seed=5), each)
        deltas = run(engine, [sequence])[id]
        assert sequence.stats.cached == spared
        assert deltas[-1].num_cached == (0 if id == "both" else max(spared))


def test_only_verified_tokens_are_published() -> None:
    """A wrong proposal never becomes somebody's prefix: every text equals its text alone."""
    rng = random.Random(2)
    engine = new_engine("cos")
    for number in range(20):
        prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 14))]
        seed = rng.randrange(3)
        shared = text(engine, start(f"s{number}", prompt, seed=seed))
        assert shared == text(new_engine("cos", prefix_cache=False), start("s", prompt, seed=seed))
    assert engine.scheduler.pages.num_idle()[0] > 0


def test_nobody_finds_a_page_before_its_tokens_are_verified() -> None:
    """Though a model has filled it with what it proposed."""
    engine = new_engine("cos")
    sequence = start("s", SYSTEM, max_tokens=40)
    pages = engine.scheduler.pages
    num_filled = 0
    engine.add(sequence)
    while engine.has_work:
        engine.step()
        for model, pool in enumerate(pages._pools):
            other = PageTable(pool, PrefixKeys(pool.page_size))
            found = other.adopt(sequence.token_ids, 0, len(sequence))
            other.release()
            assert found <= sequence.num_verified
            num_filled += sequence.num_seen[model] // 4 > sequence.num_verified // 4
    assert num_filled > 0


@pytest.mark.parametrize("name", ["cos", "three", "mixture", "plain"])
def test_random_arrivals_aborts_and_preemptions(name: str) -> None:
    """Shared prefixes in too little memory: texts stay what they are, and no page is lost."""
    rng = random.Random(11)
    steps: list[StepStats] = []
    engine = new_engine(name, steps, num_pages=20, max_sequences=6, max_step_tokens=13)
    sequences = [
        start(
            f"s{i}",
            [*SYSTEM[: rng.choice([4, 8, 13])], *[rng.randrange(20)] * rng.randrange(1, 9)],
            name,
            seed=i,
            max_tokens=rng.randrange(1, 25),
        )
        for i in range(24)
    ]
    prompts = {s.id: list(s.token_ids) for s in sequences}
    made: dict[str, list[int]] = {s.id: [] for s in sequences}
    finished, aborted, queue = set(), set(), list(sequences)
    while engine.has_work or queue:
        while queue and rng.random() < 0.4:
            engine.add(queue.pop())
        for delta in engine.step():
            made[delta.sequence_id] += delta.token_ids
            if delta.finish_reason is not None:
                finished.add(delta.sequence_id)
        running = [s.id for s in engine.scheduler.running]
        if running and rng.random() < 0.03:
            aborted.add(victim := rng.choice(running))
            engine.abort(victim)
        engine.scheduler.check_integrity()
    assert finished | aborted == set(made)
    assert len(finished) > 12
    assert sum(step.num_preempted for step in steps) > 0
    assert sum(num_cached(steps)) > 0
    assert not any(engine.scheduler.pages.num_used())
    for sequence in sequences:
        if sequence.id in finished:
            params = sequence.params
            alone = Sequence.start("s", prompts[sequence.id], params, sequence.decoding)
            assert tuple(made[sequence.id]) == text(new_engine(name, prefix_cache=False), alone)


def test_who_waits_for_pages_looks_for_its_prefix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until more pages are free: a long prefix takes long to find."""
    looks: list[int] = []
    adopt = PageTable.adopt

    def counted(self: PageTable, token_ids: list[int], num_seen: int, limit: int) -> int:
        looks.append(limit)
        return adopt(self, token_ids, num_seen, limit)

    engine = new_engine(num_pages=1 + 14)
    first = start("first", SYSTEM, max_tokens=40)
    engine.add(first)
    while first.num_generated < 20:
        engine.step()
    monkeypatch.setattr(PageTable, "adopt", counted)
    second = start("second", [*SYSTEM[:12], *[7] * 20])
    engine.add(second)
    num_steps = 0
    while not first.is_finished:
        assert second.status is Status.WAITING
        engine.step()
        num_steps += 1
    assert num_steps > 10
    assert len(looks) == 2  # in the pages of both models
    while engine.has_work:
        engine.step()
    assert second.stats.cached == [12, 12]
    expected = text(new_engine(prefix_cache=False), start("alone", [*SYSTEM[:12], *[7] * 20]))
    assert tuple(second.token_ids[32:]) == expected


def test_who_is_refused_pages_keeps_and_counts_nothing_and_asks_again_once_there_are_more() -> None:
    pools = [PagePool(1 + 7, 4) for _ in range(2)]
    pages = SequencePages(pools, prefix_cache=True)
    first, second = start("first", SYSTEM[:8]), start("second", SYSTEM)
    for sequence in (first, second):
        pages.add(sequence)
    assert pages.reserve(first, range(2))
    first.num_seen = [8, 8]
    pages.publish(first)
    taken = pools[0].take(3)  # one is left, of two that it needs behind what it finds
    for _ in range(2):
        assert not pages.reserve(second, range(2))
        assert (second.num_seen, second.stats.cached) == ([0, 0], [0, 0])
        assert pages.take_num_cached() == (0, 0)
        assert pages.table(second, 0).pages == pages.table(second, 1).pages == []
    pools[0].give_back(taken[:1])
    assert pages.reserve(second, range(2))
    assert second.num_seen == second.stats.cached == [8, 8]
    assert pages.take_num_cached() == (8, 8)


def test_what_a_step_that_came_to_nothing_had_to_tell_is_told_by_the_next() -> None:
    engine = new_engine()
    text(engine, start("first", SYSTEM))
    engine.add(start("again", SYSTEM))
    plan = engine.scheduler.plan()
    assert plan is not None
    assert (plan.num_preempted, plan.num_cached) == (0, (12, 12))
    engine.scheduler.undo(replace(plan, num_preempted=2))
    plan = engine.scheduler.plan()
    assert plan is not None
    assert (plan.num_preempted, plan.num_cached) == (2, (12, 12))

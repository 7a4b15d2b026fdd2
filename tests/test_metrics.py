"""Metrics: what a step and a request add to which series."""

from __future__ import annotations

import asyncio
import time

import pytest

from server.core.combination import Combination
from server.core.sequence import SequenceStats
from server.core.stats import Delivery, ShadowStats, StepStats
from server.engine.cost_table import CostTable, Timings
from server.errors import EngineOverloaded
from server.metrics import REJECTIONS, Metrics, ModelFacts
from tests.support.api import make_config
from tests.support.engines import make_decoding

COS = make_decoding("cos", Combination.weighted((0.5, 0.5)), gamma=4)
STANDARD = make_decoding("standard", Combination.weighted((0.5, 0.5)))


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(make_config())


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None, f"no series {name} {labels}"
    return found


def test_known_series_start_at_0(metrics: Metrics) -> None:
    for name in ("m0", "m1"):
        assert value(metrics, "cos_spec_draft_tokens_total", proposer=name) == 0
        for phase in ("prefill", "propose", "score"):
            forwards = {"model": name, "phase": phase}
            assert value(metrics, "cos_model_forward_passes_total", **forwards) == 0
        at = {"proposer": name, "position": "7"}
        assert value(metrics, "cos_spec_accepted_tokens_per_position_total", **at) == 0
    for reason in REJECTIONS:
        assert value(metrics, "cos_requests_rejected_total", reason=reason) == 0


def test_two_apps_share_nothing() -> None:
    first, second = Metrics(make_config()), Metrics(make_config())
    first.reject("validation")
    assert value(second, "cos_requests_rejected_total", reason="validation") == 0


def test_a_step(metrics: Metrics) -> None:
    metrics.observe_step(
        StepStats(
            model=1,
            num_sequences=3,
            num_decoding=2,
            num_tokens=10,
            num_prefill_tokens=4,
            forward_seconds=0.2,
            combine_seconds=0.125,
            step_seconds=0.5,
            overlaps=True,
            num_proposed=2,
            num_bonus=1,
            verified_by_offset=[
                *[(0, 0, True)] * 2,
                (0, 1, True),
                (0, 0, False),
                (1, 2, True),
            ],
            num_recovered=1,
            num_drawn=2,
            tails=[3, 1],
            deliveries=[
                Delivery(COS, 3, has_first=True),
                Delivery(COS, 2, has_first=False),
                Delivery(STANDARD, 1, has_first=False),
            ],
            baseline_seconds=1.5,
            num_discarded=1,
            num_preempted=1,
            num_cached=(16, 32),
        )
    )
    assert value(metrics, "cos_spec_draft_tokens_total", proposer="m1") == 2
    assert value(metrics, "cos_spec_accepted_tokens_total", proposer="m0") == 3
    assert value(metrics, "cos_spec_accepted_tokens_total", proposer="m1") == 1
    first = {"proposer": "m0", "position": "0"}
    assert value(metrics, "cos_spec_verified_tokens_per_position_total", **first) == 3
    assert value(metrics, "cos_spec_accepted_tokens_per_position_total", **first) == 2
    assert value(metrics, "cos_spec_bonus_tokens_total", model="m1") == 1
    assert value(metrics, "cos_spec_recovered_tokens_total") == 1
    assert value(metrics, "cos_spec_drawn_tokens_total") == 2
    assert value(metrics, "cos_spec_discarded_tokens_total") == 1
    generated = "cos_generated_tokens_total"
    assert value(metrics, generated, method="weighted", strategy="cos") == 5
    assert value(metrics, generated, method="weighted", strategy="standard") == 1
    assert value(metrics, "cos_spec_tail_tokens_count") == 2
    assert value(metrics, "cos_spec_tail_tokens_sum") == 4
    assert value(metrics, "cos_spec_gamma_count") == 1
    assert value(metrics, "cos_spec_gamma_sum") == 4
    assert value(metrics, "cos_preemptions_total") == 1
    assert value(metrics, "cos_prefix_cache_hit_tokens_total", model="m0") == 16
    assert value(metrics, "cos_prefix_cache_hit_tokens_total", model="m1") == 32
    assert value(metrics, "cos_model_forward_passes_total", model="m1", phase="score") == 1
    assert value(metrics, "cos_model_forward_seconds_total", model="m1", phase="score") == 0.2
    assert value(metrics, "cos_model_sequence_forwards_total", model="m1") == 2
    tokens = "cos_model_forward_tokens_total"
    assert value(metrics, tokens, model="m1", phase="prefill") == 4
    assert value(metrics, tokens, model="m1", phase="decode") == 6
    assert value(metrics, "cos_decode_seconds_total") == pytest.approx(0.3)
    assert value(metrics, "cos_combine_seconds_total") == 0.125
    assert value(metrics, "cos_overlapping_steps_total") == 1
    assert value(metrics, "cos_batch_size_sum") == 3


def test_what_auto_moves_texts_to(metrics: Metrics) -> None:
    """Lengths of strategies that propose, and of no others."""
    lengths = make_decoding("cos", Combination.weighted((0.5, 0.5)), gamma=(4, 0))
    mixture = make_decoding("mixture", Combination.weighted((0.5, 0.5)), gamma=3)
    metrics.observe_step(StepStats(model=0, chosen=[lengths, STANDARD, mixture, mixture]))
    for strategy, count in (("cos", 1), ("standard", 1), ("mixture", 2), ("speculative", 0)):
        assert value(metrics, "cos_auto_choices_total", strategy=strategy) == count
    for proposer, length in (("m0", 4), ("m1", 0)):
        assert value(metrics, "cos_auto_gamma_count", proposer=proposer) == 1
        assert value(metrics, "cos_auto_gamma_sum", proposer=proposer) == length


def test_a_mixture_proposes_where_it_drafts_through_coins_of_others(metrics: Metrics) -> None:
    for kappa, count in ((0, 0), (1, 1)):
        decoding = make_decoding("mixture", Combination.weighted((0.5, 0.5)), 3, kappa)
        deliveries = [Delivery(decoding, 1, has_first=True)]
        metrics.observe_step(StepStats(model=0, deliveries=deliveries))
        assert value(metrics, "cos_spec_gamma_count") == count


def test_prompt_lookup_is_a_proposer(metrics: Metrics) -> None:
    for outcome in ("proposed", "withheld", "missed"):
        assert value(metrics, "cos_prompt_lookups_total", outcome=outcome) == 0
    metrics.observe_step(
        StepStats(
            model=1,
            num_looked_up=4,
            lookups=["proposed", "missed", "missed"],
            verified_by_offset=[(-1, 0, True), (-1, 1, False), (0, 0, True)],
        )
    )
    assert value(metrics, "cos_prompt_lookups_total", outcome="missed") == 2
    assert value(metrics, "cos_prompt_lookups_total", outcome="proposed") == 1
    proposer = {"proposer": "prompt_lookup"}
    assert value(metrics, "cos_spec_draft_tokens_total", **proposer) == 4
    assert value(metrics, "cos_spec_accepted_tokens_total", **proposer) == 1
    second = {**proposer, "position": "1"}
    assert value(metrics, "cos_spec_verified_tokens_per_position_total", **second) == 1
    assert value(metrics, "cos_spec_accepted_tokens_per_position_total", **second) == 0
    assert value(metrics, "cos_spec_draft_tokens_total", proposer="m1") == 0


def test_positions_are_bounded(metrics: Metrics) -> None:
    before = len(metrics.render().splitlines())
    metrics.observe_step(StepStats(0, verified_by_offset=[(0, 10_000, True)]))
    assert len(metrics.render().splitlines()) == before


def test_tokens_that_come_together_share_their_time(metrics: Metrics) -> None:
    with metrics.request("completions", 5) as observed:
        assert value(metrics, "cos_requests_waiting") == 1
        observed.tokens(0, 0)
        assert value(metrics, "cos_time_to_first_token_seconds_count") == 0
        started = time.perf_counter()
        observed.tokens(0, 2)
        assert value(metrics, "cos_requests_waiting") == 0
        assert value(metrics, "cos_requests_running") == 1
        time.sleep(0.01)
        observed.tokens(0, 4)
        seconds = time.perf_counter() - started
        observed.tokens(1, 1)
        observed.finish("stop")
    assert value(metrics, "cos_requests_running") == 0
    assert value(metrics, "cos_time_to_first_token_seconds_count") == 1
    assert value(metrics, "cos_inter_token_seconds_count") == 4
    assert 0.01 <= value(metrics, "cos_inter_token_seconds_sum") <= seconds
    assert value(metrics, "cos_prompt_tokens_total") == 5
    assert value(metrics, "cos_request_generation_tokens_sum") == 7
    finished = "cos_requests_finished_total"
    assert value(metrics, finished, endpoint="completions", reason="stop") == 1


def test_the_time_of_a_request_adds_up(metrics: Metrics) -> None:
    stats = [SequenceStats([], []), SequenceStats([], [])]
    with metrics.request("completions", 5, stats) as observed:
        stats[1].first_run = time.perf_counter() + 0.5  # later than the other one: of no account
        stats[0].first_run = time.perf_counter()
        time.sleep(0.01)
        observed.tokens(0, 1)
        time.sleep(0.01)
        observed.finish("stop")
    parts = [
        value(metrics, f"cos_request_{part}_seconds_sum") for part in ("queue", "prefill", "decode")
    ]
    assert sum(parts) == pytest.approx(value(metrics, "cos_request_duration_seconds_sum"))
    assert parts[0] < 0.005
    assert min(parts[1:]) >= 0.01


def test_a_request_without_a_token_has_no_parts(metrics: Metrics) -> None:
    with metrics.request("completions", 5, [SequenceStats([], [])]) as observed:
        observed.finish("stop")
    for part in ("queue", "prefill", "decode"):
        assert value(metrics, f"cos_request_{part}_seconds_count") == 0


def test_no_series_tells_when_a_counter_was_made(metrics: Metrics) -> None:
    assert "_created" not in metrics.render().decode()


@pytest.mark.parametrize(
    ("error", "reason"),
    [(asyncio.CancelledError(), "cancelled"), (GeneratorExit(), "cancelled"), (OSError(), "error")],
)
def test_every_end_is_counted(metrics: Metrics, error: BaseException, reason: str) -> None:
    with pytest.raises(type(error)), metrics.request("completions", 1):
        raise error
    finished = "cos_requests_finished_total"
    assert value(metrics, finished, endpoint="completions", reason=reason) == 1
    assert value(metrics, "cos_requests_waiting") == 0


def test_a_refused_request_has_not_finished(metrics: Metrics) -> None:
    with pytest.raises(EngineOverloaded), metrics.request("completions", 1):
        raise EngineOverloaded("full")
    assert value(metrics, "cos_request_duration_seconds_count") == 0
    assert value(metrics, "cos_requests_waiting") == 0


def test_pages_and_queue_are_read_when_asked(metrics: Metrics) -> None:
    used = [1, 2]
    idle = 2.0
    facts = [ModelFacts("cpu", "float32", 5, 10, 512), ModelFacts("cuda:0", "float16", 6, 20, 1024)]
    metrics.engine.watch_models(lambda: tuple(used), lambda: (1, 2), facts)
    metrics.engine.watch(lambda: 3, lambda: 4, lambda: idle)
    assert value(metrics, "cos_kv_pages_used", model="m1") == 2
    assert value(metrics, "cos_kv_pages_idle", model="m1") == 2
    assert value(metrics, "cos_kv_pages", model="m1") == 20
    assert value(metrics, "cos_kv_used_bytes", model="m1") == 2048
    assert value(metrics, "cos_kv_limit_bytes", model="m1") == 20480
    assert value(metrics, "cos_model_weight_bytes", model="m1") == 6
    assert value(metrics, "cos_model_info", model="m1", device="cuda:0", dtype="float16") == 1
    used[1] = 7
    assert value(metrics, "cos_kv_pages_used", model="m1") == 7
    assert value(metrics, "cos_sequences_running") == 3
    assert value(metrics, "cos_sequences_waiting") == 4
    assert value(metrics, "cos_engine_idle_seconds_total") == 2
    idle = 3.5
    assert value(metrics, "cos_engine_idle_seconds_total") == 3.5


def test_whether_requests_are_taken(metrics: Metrics) -> None:
    phase = "loading"
    metrics.engine.watch_phase(lambda: phase)
    assert value(metrics, "cos_ready") == value(metrics, "cos_draining") == 0
    phase = "ready"
    assert value(metrics, "cos_ready") == 1
    phase = "draining"
    assert value(metrics, "cos_ready") == 0
    assert value(metrics, "cos_draining") == 1


def test_shadow_windows_are_counted_where_they_are_on(metrics: Metrics) -> None:
    shadow = ShadowStats(2.0, 8, 3.0, 1.5, "measured")
    metrics.observe_step(StepStats(0, shadow=shadow))
    assert "cos_shadow" not in metrics.render().decode()
    metrics.speedup.shadowed()
    assert value(metrics, "cos_shadow_windows_total", outcome="abandoned") == 0
    metrics.observe_step(StepStats(0, shadow=shadow))
    metrics.observe_step(StepStats(0, shadow=ShadowStats(0.5, 1)))
    assert value(metrics, "cos_shadow_standard_seconds_total") == 2.5
    assert value(metrics, "cos_shadow_standard_tokens_total") == 9
    assert value(metrics, "cos_shadow_baseline_seconds_total") == 3
    assert value(metrics, "cos_shadow_decode_seconds_total") == 1.5
    assert value(metrics, "cos_shadow_windows_total", outcome="measured") == 1


def test_no_baseline_before_calibration(metrics: Metrics) -> None:
    assert "cos_baseline" not in metrics.render().decode()
    metrics.speedup.calibrated(
        CostTable(Timings((1, 2), ((0.1, 0.2), (0.3, 0.4)), (0.0, 0.0), (0.01, 0.02)))
    )
    assert value(metrics, "cos_baseline_step_seconds", model="m1", batch="2") == 0.4
    assert value(metrics, "cos_baseline_rest_seconds", batch="1") == 0.01
    metrics.observe_step(StepStats(0, num_tokens=4, step_seconds=2.0, baseline_seconds=1.5))
    assert value(metrics, "cos_baseline_estimated_seconds_total") == 1.5
    assert value(metrics, "cos_decode_seconds_total") == 2

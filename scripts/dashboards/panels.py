"""What each dashboard shows."""

from __future__ import annotations

from scripts.dashboards.panel import (
    Dashboard,
    Panel,
    by_mean,
    mean,
    quantiles,
    rate,
    ratio,
    series,
)

TRAFFIC = (
    Panel(
        "Generated tokens",
        "short",
        (("tokens/s", rate("cos_generated_tokens_total")),),
        "Tokens that belong to clients' texts, per second.",
    ),
    Panel(
        "Requests in the server",
        "short",
        (
            ("running", f"sum({series('cos_requests_running')})"),
            ("waiting for a first token", f"sum({series('cos_requests_waiting')})"),
        ),
    ),
    Panel(
        "Requests finished",
        "reqps",
        (("{{reason}}", rate("cos_requests_finished_total", "reason")),),
        is_stacked=True,
    ),
)
LATENCY = (
    Panel("Time to first token", "s", quantiles("cos_time_to_first_token_seconds")),
    Panel(
        "Time between tokens",
        "s",
        quantiles("cos_inter_token_seconds"),
        "Tokens that come together share the time that passed.",
    ),
    Panel("Request duration", "s", quantiles("cos_request_duration_seconds")),
    Panel(
        "Where a request's time goes",
        "s",
        (
            ("queue", mean("cos_request_queue_seconds")),
            ("prompt", mean("cos_request_prefill_seconds")),
            ("decoding", mean("cos_request_decode_seconds")),
        ),
        "Means over requests that got a token: until a model first ran over the prompt, until the "
        "first token, until the end.",
        is_stacked=True,
    ),
)
TROUBLE = (
    Panel(
        "Answers with 5xx",
        "reqps",
        (
            (
                "{{status}}",
                rate(
                    "cos_http_requests_total",
                    "status",
                    'status=~"5..", route!~"/ready|/health|/ping|/metrics|/version"',
                ),
            ),
        ),
        "Probes aside. Nothing to draw means none.",
    ),
    Panel(
        "Refused requests",
        "reqps",
        (("{{reason}}", f"{rate('cos_requests_rejected_total', 'reason')} > 0"),),
        "Nothing to draw means none.",
    ),
    Panel(
        "Sequences waiting in the engine",
        "short",
        (("waiting", f"sum({series('cos_sequences_waiting')})"),),
        "A queue that stands means that sequences or KV pages are all taken.",
    ),
    Panel(
        "Takes requests",
        "short",
        (
            ("ready", f"min({series('cos_ready')})"),
            ("draining", f"max({series('cos_draining')})"),
        ),
        "1 is yes. Ready is the least of all servers, draining the most.",
        maximum=1,
    ),
    Panel(
        "KV pages in use",
        "percentunit",
        (
            (
                "{{model}}",
                ratio(
                    f"sum by (model) ({series('cos_kv_pages_used')})",
                    f"sum by (model) ({series('cos_kv_pages')})",
                ),
            ),
        ),
        maximum=1,
    ),
    Panel("Sequences in a step", "short", (("mean", mean("cos_batch_size")),)),
    Panel(
        "Faults survived",
        "short",
        (("{{kind}}", rate("cos_engine_faults_total", "kind")),),
        "Per second: sequences that a fault ended alone, and steps made smaller for memory.",
        is_stacked=True,
    ),
)
SPEEDUP = (
    Panel(
        "Estimated speedup over standard decoding",
        "x",
        (
            (
                "estimated",
                ratio(
                    rate("cos_baseline_estimated_seconds_total"), rate("cos_decode_seconds_total")
                ),
            ),
        ),
        "What standard decoding of the same tokens would have taken, by forwards timed at start, "
        "over what decoding took. Below 1 is slower. No series where calibration is off.",
        thresholds=((None, "red"), (1, "green")),
    ),
    Panel(
        "Measured speedup over standard decoding",
        "x",
        (
            (
                "measured",
                ratio(
                    rate("cos_shadow_baseline_seconds_total"),
                    rate("cos_shadow_decode_seconds_total"),
                ),
            ),
        ),
        "What standard decoding took when it was last measured with as many sequences, over what "
        "decoding takes between measurements. No series unless engine.shadow is set.",
        thresholds=((None, "red"), (1, "green")),
        is_rare=True,
    ),
    Panel(
        "Both sides of the speedup",
        "percentunit",
        (
            ("decoding took", rate("cos_decode_seconds_total")),
            ("standard would have taken", rate("cos_baseline_estimated_seconds_total")),
        ),
        "Seconds of each second.",
    ),
    Panel(
        "Generated tokens by strategy",
        "short",
        (("{{method}} {{strategy}}", rate("cos_generated_tokens_total", "method, strategy")),),
        "Tokens per second.",
        is_stacked=True,
    ),
)
ACCEPTED_AT = "cos_spec_accepted_tokens_per_position_total"
VERIFIED_AT = "cos_spec_verified_tokens_per_position_total"
ACCEPTANCE = (
    Panel(
        "Acceptance by proposer",
        "percentunit",
        (("{{proposer}}", ratio(rate(ACCEPTED_AT, "proposer"), rate(VERIFIED_AT, "proposer"))),),
        "Of the proposed tokens that were verified; those behind a rejection never are.",
        maximum=1,
    ),
    Panel(
        "Acceptance by position",
        "percentunit",
        (("{{position}}", ratio(rate(ACCEPTED_AT, "position"), rate(VERIFIED_AT, "position"))),),
        "Position in the pending tail, 0-based; each with its own denominator.",
        maximum=1,
    ),
    Panel(
        "Where tokens come from",
        "short",
        (
            ("accepted", rate("cos_spec_accepted_tokens_total")),
            ("recovered", rate("cos_spec_recovered_tokens_total")),
            ("drawn", rate("cos_spec_drawn_tokens_total")),
            ("forced", rate("cos_forced_tokens_total")),
            ("cut off by an end", f"-{rate('cos_spec_discarded_tokens_total')}"),
        ),
        "Verified tokens per second, and below zero those of them that no client got.",
    ),
)
CYCLES = (
    Panel(
        "Verified tokens per cycle",
        "short",
        (
            (
                "verified",
                ratio(
                    f"({rate('cos_spec_accepted_tokens_total')}"
                    f" + {rate('cos_spec_recovered_tokens_total')})",
                    rate("cos_spec_tail_tokens_count"),
                ),
            ),
            ("pending before", mean("cos_spec_tail_tokens")),
        ),
        "A cycle is one verification of one sequence: what was pending, and what it became.",
    ),
    Panel(
        "Proposal length asked for",
        "short",
        (("mean gamma of new texts", mean("cos_spec_gamma")),),
        "Of the first model, over texts that began and whose strategy proposes.",
    ),
    Panel(
        "Proposal lengths that auto chose",
        "short",
        (("{{proposer}}", by_mean("cos_auto_gamma", "proposer")),),
        "Mean over texts that it moved to other lengths; 0 is a model that only scores. Nothing "
        "to draw means no change.",
        is_rare=True,
    ),
    Panel(
        "Changes by auto",
        "short",
        (("to {{strategy}}", rate("cos_auto_choices_total", "strategy")),),
        "Texts per second that it moved to other lengths or to a strategy while they ran.",
        is_stacked=True,
    ),
    Panel(
        "Tokens per forward and sequence",
        "short",
        (
            (
                "{{model}}",
                ratio(
                    rate("cos_generated_tokens_total"),
                    rate("cos_model_sequence_forwards_total", "model"),
                    "on () group_right () ",
                ),
            ),
        ),
        "Standard decoding is 1 for every model it needs. An upper bound of the speedup: scoring "
        "several tokens costs more than scoring one.",
    ),
)
FORWARD = "cos_model_forward_seconds_total"
STEP = "cos_engine_step_seconds_sum"
COMBINE = "cos_combine_seconds_total"
IDLE = "cos_engine_idle_seconds_total"
TIME = (
    Panel(
        "Where a second goes",
        "percentunit",
        (
            ("{{model}} {{phase}}", rate(FORWARD, "model, phase")),
            ("combine, verify, draw", rate(COMBINE)),
            (
                "planning and text",
                f"clamp_min({rate(STEP)} - {rate(FORWARD)} - {rate(COMBINE)}, 0)",
            ),
            (
                "between steps",
                f"clamp_min(sum({series('cos_ready')}) - {rate(STEP)} - {rate(IDLE)}, 0)",
            ),
            ("idle", rate(IDLE)),
        ),
        "Seconds of each second, summed over servers that take requests. A forward counts as what "
        "most of it was for.",
        is_stacked=True,
    ),
    Panel("Engine step", "s", quantiles("cos_engine_step_seconds")),
    Panel(
        "Prompt tokens",
        "short",
        (("tokens/s", rate("cos_prompt_tokens_total")),),
        "Of requests that got a token, per second.",
    ),
)
MODELS = (
    Panel(
        "Time in forwards",
        "percentunit",
        (("{{model}}", rate(FORWARD, "model")),),
        "Seconds of each second.",
    ),
    Panel(
        "Forwards",
        "short",
        (("{{model}} {{phase}}", rate("cos_model_forward_passes_total", "model, phase")),),
        "Per second.",
    ),
    Panel(
        "Seconds of a forward",
        "s",
        (
            (
                "{{model}} {{phase}}",
                ratio(
                    rate(FORWARD, "model, phase"),
                    rate("cos_model_forward_passes_total", "model, phase"),
                ),
            ),
        ),
    ),
    Panel(
        "Tokens fed",
        "short",
        (("{{model}} {{phase}}", rate("cos_model_forward_tokens_total", "model, phase")),),
        "Per second; prefill is prompts and what a preemption lost.",
    ),
    Panel(
        "Proposed tokens",
        "short",
        (
            ("{{proposer}}", rate("cos_spec_draft_tokens_total", "proposer")),
            ("{{model}} bonus", rate("cos_spec_bonus_tokens_total", "model")),
        ),
        "Per second; bonus tokens are among the proposed ones.",
    ),
    Panel(
        "Timed at start: a forward of one token each",
        "s",
        (
            (
                "{{model}} x {{batch}}",
                f"max by (model, batch) ({series('cos_baseline_step_seconds')})",
            ),
            ("the rest x {{batch}}", f"max by (batch) ({series('cos_baseline_rest_seconds')})"),
        ),
        "By number of sequences; the slowest of all servers.",
    ),
)
LOAD = Panel(
    "Load of the machine",
    "x",
    (("{{model}}", f"max by (model) ({series('cos_model_load')})"),),
    "Seconds of forwards now over those timed at start; the estimated speedup allows for it.",
)
MEMORY = (
    Panel(
        "KV memory in use",
        "bytes",
        (
            (
                "{{model}}",
                f"sum by (model) ({series('cos_kv_used_bytes')})",
            ),
        ),
        is_stacked=True,
    ),
    Panel(
        "Memory taken at start",
        "bytes",
        (
            ("{{model}} KV", f"sum by (model) ({series('cos_kv_limit_bytes')})"),
            ("{{model}} weights", f"sum by (model) ({series('cos_model_weight_bytes')})"),
        ),
        is_stacked=True,
    ),
    Panel(
        "Prompt tokens from the prefix cache",
        "percentunit",
        (
            (
                "{{model}}",
                ratio(
                    rate("cos_prefix_cache_hit_tokens_total", "model"),
                    f"({rate('cos_prefix_cache_hit_tokens_total', 'model')} + "
                    + rate("cos_model_forward_tokens_total", "model", 'phase="prefill"')
                    + ")",
                ),
            ),
        ),
        "Of all tokens that a model had to read or find.",
        maximum=1,
    ),
    Panel(
        "Preemptions",
        "short",
        (("sequences/s", rate("cos_preemptions_total")),),
        "Sequences that lost their pages to older ones and start over, per second.",
    ),
    Panel(
        "Memory of the process",
        "bytes",
        (("resident", f"sum({series('process_resident_memory_bytes')})"),),
    ),
)
DASHBOARDS = (
    Dashboard(
        "cos-overview",
        "cos-server overview",
        (("Traffic", TRAFFIC), ("Latency", LATENCY), ("Errors and saturation", TROUBLE)),
    ),
    Dashboard(
        "cos-decoding",
        "cos-server collaborative decoding",
        (
            ("Speedup", SPEEDUP),
            ("Acceptance", ACCEPTANCE),
            ("Cycles", CYCLES),
            ("Time", TIME),
        ),
    ),
    Dashboard(
        "cos-models",
        "cos-server models and memory",
        (("Models", (*MODELS, LOAD)), ("Memory", MEMORY)),
    ),
)

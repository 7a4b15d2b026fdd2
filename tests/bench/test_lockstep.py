"""Lanes write all their texts in turns, and only their own steps count."""

import json
import time
from collections import defaultdict
from typing import Any

import pytest

from server.bench import lockstep
from server.bench.in_process import InProcessEngine
from server.bench.lockstep import Lane, Work, run
from server.bench.strategy_spec import parse_strategies
from tests.support.tiny_models import write_pair_config


class Clock:
    """Advanced by whoever works."""

    now = 0.0


class Text:
    def __init__(self, num_tokens):
        self.num_generated = 0
        self.max_tokens = num_tokens

    @property
    def is_finished(self):
        return self.num_generated == self.max_tokens


class Engine:
    """One or several tokens of each text a step, which takes so long."""

    def __init__(self, clock, seconds, num_tokens):
        self.clock, self.seconds, self.num_tokens = clock, seconds, num_tokens
        self.texts = []
        self.most = 0

    def start(self, prompt, params, strategy, schema):
        self.texts.append(Text(params.max_tokens))
        return self.texts[-1]

    def drop(self, sequences):
        self.dropped = len(list(sequences))

    def step(self):
        self.clock.now += self.seconds
        open_texts = [text for text in self.texts if text.num_generated < text.max_tokens]
        self.most = max(self.most, len(open_texts))
        for text in open_texts:
            text.num_generated = min(text.max_tokens, text.num_generated + self.num_tokens)


def test_rates_are_of_their_own_steps(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    engines: list[Any] = [Engine(clock, 1.0, 1), Engine(clock, 1.5, 2)]
    work = Work([("a", 2), ("a", 4), ("a", 4), ("a", 4), ("a", 4), ("a", 4)], 2, 0.0)
    specs = parse_strategies("standard,auto", None)
    lanes = [Lane(spec, engine, work) for spec, engine in zip(specs, engines, strict=True)]
    run(lanes)
    # The first text ends after two tokens; two are in flight until the last but one has ended.
    assert [lane.num_tokens for lane in lanes] == [16, 16]
    assert [lane.seconds for lane in lanes] == [8.0, 6.0]
    assert lanes[1].rate / lanes[0].rate == pytest.approx(8 / 6)
    assert [engine.most for engine in engines] == [2, 2]
    assert [engine.dropped for engine in engines] == [1, 1]


def lockstep_main(tmp_path, *options):
    path, prompts = write_pair_config(tmp_path, max_length=64), tmp_path / "short.jsonl"
    prompts.write_text('{"prompt": "for"}\n{"prompt": "return value"}\n')
    return lockstep.main(
        ["--config", str(path), "--prompts", str(prompts), "--max-tokens", "6", "--per-slot", "2"]
        + ["--set", "engine.calibrate=false", *options]
    )


def test_a_tiny_pair(tmp_path, capsys):
    out = tmp_path / "lockstep.json"
    kinds = ("--kinds", "weighted-t1", "contrastive-t0", "--out", str(out))
    assert lockstep_main(tmp_path, *kinds, "--concurrency", "1") == 0
    assert "contrastive-t0 short 1: " in capsys.readouterr().out
    assert lockstep_main(tmp_path, *kinds, "--concurrency", "1,2") == 0
    shown = capsys.readouterr().out
    assert "contrastive-t0 short 1: " not in shown, "it is in the file"
    assert "weighted-t1 short 2: " in shown
    assert shown.count("(1.00)") >= 4 + 2
    assert len([line for line in shown.splitlines() if line.startswith("| ")]) == 2 + 4
    cells = json.loads(out.read_text())["cells"]
    assert [(cell["kind"], cell["in_flight"]) for cell in cells] == [
        ("weighted-t1", 1),
        ("contrastive-t0", 1),
        ("weighted-t1", 2),
        ("contrastive-t0", 2),
    ]
    assert list(cells[0]["lanes"]) == ["standard", "auto"]


def test_texts_of_a_form_are_the_same_by_all_strategies(tmp_path, monkeypatch):
    start, texts = InProcessEngine.start, defaultdict(list)

    def recorded(self, prompt, params, strategy, schema=None):
        sequence = start(self, prompt, params, strategy, schema)
        texts[strategy.label].append(sequence)
        return sequence

    monkeypatch.setattr(InProcessEngine, "start", recorded)
    schema = '{"enum": ["for for for", "return value return value"]}'
    options = ("--kinds", "weighted-t1", "--schema", schema, "--max-tokens", "20")
    assert lockstep_main(tmp_path, *options, "--concurrency", "2") == 0
    ids = {
        label: [text.token_ids[text.num_prompt :] for text in found if text.is_finished]
        for label, found in texts.items()
    }
    least = min(map(len, ids.values()))
    assert least >= 22
    assert ids["standard"][:least] == ids["auto"][:least]
    assert len({tuple(text) for text in ids["auto"]}) == 2


def test_what_is_no_schema(tmp_path, capsys):
    assert lockstep_main(tmp_path, "--schema", '{"type": "none"}', "--concurrency", "1") == 2
    assert "--schema: " in capsys.readouterr().err


def test_options_that_cannot_be(tmp_path, capsys):
    assert lockstep_main(tmp_path, "--per-slot", "1") == 2
    assert "--per-slot: at least 2" in capsys.readouterr().err

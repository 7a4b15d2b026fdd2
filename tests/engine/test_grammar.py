"""Texts that follow a grammar: exact under every strategy, and rolled back as tokens are."""

from __future__ import annotations

import json
import math
import random
import re
import threading
import time
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper
from tokenizers import AddedToken

from server.core.combination import Combination
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.decoding.grammar import GrammarError, GrammarMatcher, Grammars, Kind
from server.runner.attention_choice import CpuKernels
from tests.engine.test_exactness import (
    COMBINATIONS,
    KERNELS,
    MIXTURES,
    SCHEDULES,
    decoding_of,
)
from tests.support import tiny_grammars
from tests.support.engines import generated, make_decoding, make_engine, run
from tests.support.exact import Z_LIMIT, Law, chi_square_z, softmax
from tests.support.table_lm import TableLM
from tests.support.tiny_models import TURN_END, make_tokenizer

TOKENS = ["a", "b", "ab", "c", ""]  # the last one ends the text
EOS = 4
PROMPT = [0, 3, 1]
PATTERN = "(ab|c)+b?a"


class _Vocabulary:
    eos_token_id = EOS
    bos_token_id = None
    special_token_ids = (EOS,)
    tokens = tuple(text.encode() or b"<end>" for text in TOKENS)

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        return [TOKENS.index(character) for character in text]


def make_grammars(eos: frozenset[int] = frozenset({EOS})) -> Grammars:
    wrapper = TokenizerWrapper(_Vocabulary())
    return Grammars(lambda ends: LLTokenizer(wrapper, eos_token=ends), eos, len(TOKENS))


GRAMMARS = make_grammars()


def matchers(count: int, pattern: str = PATTERN) -> list[GrammarMatcher]:
    return GRAMMARS.matchers("regex", pattern, count)


def strings(pattern: str, longest: int) -> set[str]:
    """All texts of the pattern, by trying."""
    found, front = set(), [""]
    for _ in range(longest):
        front = [text + letter for text in front for letter in "abc"]
        found |= {text for text in front if re.fullmatch(pattern, text)}
    return found


def allowed(made: tuple[int, ...], pattern: str = PATTERN) -> list[int]:
    """Tokens after which some text of the pattern can still come, the end of a complete one."""
    whole = ALL if pattern == PATTERN else strings(pattern, 8)
    text = "".join(TOKENS[token] for token in made)
    going_on = [t for t in range(4) if any(s.startswith(text + TOKENS[t]) for s in whole)]
    return [*going_on, *[EOS] * (text in whole)]


ALL = strings(PATTERN, 12)


def exact_law(lms: list[TableLM], combination: Combination, params: SamplingParams) -> Law:
    """Each member masked and renormalised before they are mixed, as any warp.

    A text ends where only its end may follow.
    """
    law: Law = {}
    front: Law = {(): 1.0}
    while front:
        made, mass = front.popitem()
        mask = np.full(len(TOKENS), -np.inf)
        mask[allowed(made)] = 0
        raw = [lm.logits([*PROMPT, *made]) for lm in lms]
        if combination.is_logit_level:
            mix = sum(w * row for w, row in zip(combination.weights, raw, strict=True))
            if combination.plausibility:
                likely = softmax(raw[combination.reference] + mask)
                mask[likely < combination.plausibility * likely.max()] = -np.inf
            r = softmax(mix + mask)
        else:
            parts = np.stack([softmax(row + mask) for row in raw])
            r = np.asarray(combination.weights) @ parts
        if params.is_greedy:
            r = np.eye(len(r))[int(np.argmax(r))]
        for token in np.flatnonzero(r):
            longer = (*made, int(token))
            ends = len(longer) == params.max_tokens or token == EOS or allowed(longer) == [EOS]
            (law if ends else front)[longer] = mass * float(r[token])
    return law


def make_lms(num_models: int) -> list[TableLM]:
    return [TableLM(seed=51 + k, vocab_size=len(TOKENS)) for k in range(num_models)]


def sample(
    lms: list[TableLM], decoding: Any, params: list[SamplingParams], **options: Any
) -> list[tuple[int, ...]]:
    engine = make_engine(
        lms, eos=frozenset({EOS}), **{"max_sequences": 500, "max_step_tokens": 4096, **options}
    )
    sequences = [
        Sequence.start(f"s{i}", PROMPT, each, decoding, matcher=matcher)
        for i, (each, matcher) in enumerate(zip(params, matchers(len(params)), strict=True))
    ]
    deltas = run(engine, sequences)
    assert all(deltas[s.id][-1].finish_reason != "error" for s in sequences)
    engine.scheduler.check_integrity()
    return [generated(deltas[sequence.id]) for sequence in sequences]


PLAUSIBLE = {"plausible": Combination.contrastive(2, 0.5, plausibility=0.2)}
CASES = [
    *((name, "cos-3") for name in COMBINATIONS),
    *(("weighted-2", schedule) for schedule in SCHEDULES if schedule != "cos-3"),
    ("contrastive-2", "cos-each-2"),
    ("weighted-2", "kappa-0"),
    ("weighted-3", "kappa-2"),
    ("plausible", "standard"),
    ("plausible", "cos-each-2"),
]


@pytest.mark.parametrize(
    ("name", "schedule", "cpu_kernels"),
    [*((*case, "auto") for case in CASES), ("plausible", "cos-each-2", "off")],
)
def test_law(name: str, schedule: str, cpu_kernels: CpuKernels) -> None:
    combination = (COMBINATIONS | PLAUSIBLE)[name]
    lms = make_lms(len(combination.weights))
    decoding = decoding_of(schedule, combination)
    params = [SamplingParams(max_tokens=5, seed=seed) for seed in range(700)]
    law = exact_law(lms, combination, params[0])
    assert sum(law.values()) == pytest.approx(1)
    assert len(law) > 20
    samples = sample(lms, decoding, params, cpu_kernels=cpu_kernels)
    assert chi_square_z(samples, law) < Z_LIMIT
    if schedule not in MIXTURES:
        greedy = SamplingParams(max_tokens=10, temperature=0.0)
        [text] = sample(lms, decoding, [greedy], cpu_kernels=cpu_kernels)
        assert exact_law(lms, combination, greedy) == {text: 1.0}


@pytest.mark.parametrize(("name", "schedule"), [("weighted-2", "cos-3"), ("linear-3", "cos-3")])
def test_tokens_are_the_same_without_kernels(name: str, schedule: str) -> None:
    combination = COMBINATIONS[name]
    lms, decoding = make_lms(len(combination.weights)), decoding_of(schedule, combination)
    params = [SamplingParams(max_tokens=5, seed=seed) for seed in range(200)]
    params.append(SamplingParams(max_tokens=10, temperature=0.0))
    found, expected = (sample(lms, decoding, params, cpu_kernels=kernels) for kernels in KERNELS)
    assert found == expected
    assert len(set(found)) > 10


@pytest.mark.parametrize("name", ["standard", "cos"])
def test_no_token_is_reported_to_be_impossible(name: str) -> None:
    """Not even one that is plausible only beside what the grammar allows."""
    decoding = make_decoding(name, PLAUSIBLE["plausible"], gamma=3)
    engine = make_engine(make_lms(2), eos=frozenset({EOS}))
    sequences = [
        Sequence.start(f"s{i}", PROMPT, SamplingParams(seed=i, logprobs=0), decoding, 0, matcher)
        for i, matcher in enumerate(matchers(20))
    ]
    deltas = run(engine, sequences)
    found = [entry.logprob for s in sequences for d in deltas[s.id] for entry in d.logprobs]
    assert len(found) > 20
    assert min(found) > -20


@pytest.mark.parametrize("name", ["standard", "cos"])
def test_batches_and_preemptions_change_nothing(name: str) -> None:
    decoding = make_decoding(name, COMBINATIONS["weighted-2"], gamma=3)
    params = [SamplingParams(max_tokens=20, seed=seed, logprobs=0) for seed in range(12)]
    lms = make_lms(2)
    alone = [sample(lms, decoding, [each])[0] for each in params]
    steps: list[StepStats] = []
    options = {"num_pages": 9, "max_step_tokens": 11, "on_step": steps.append}
    assert sample(lms, decoding, params, **options) == alone
    assert sum(step.num_preempted for step in steps) > 0


def test_the_text_ends_where_nothing_can_follow() -> None:
    """Without a token that says so, also where such tokens are ignored or banned for longer."""
    decoding = make_decoding("cos", COMBINATIONS["weighted-2"], gamma=3)
    for options in ({}, {"ignore_eos": True}, {"min_tokens": 9}):
        params = SamplingParams(max_tokens=10, seed=3, **options)
        [matcher] = matchers(1, "ab|c")
        sequence = Sequence.start("s", PROMPT, params, decoding, matcher=matcher)
        deltas = run(make_engine(make_lms(2), eos=frozenset({EOS})), [sequence])["s"]
        assert "".join(TOKENS[token] for token in generated(deltas)) in {"ab", "c"}
        assert deltas[-1].finish_reason == "stop"
        assert generated(deltas)[-1] != EOS
        assert "".join(delta.text for delta in deltas).split() == [
            str(token) for token in generated(deltas)
        ]


def test_a_complete_text_ends_before_min_tokens_where_only_its_end_is_allowed() -> None:
    decoding = make_decoding("cos", COMBINATIONS["contrastive-2"], gamma=3)
    params = SamplingParams(max_tokens=10, min_tokens=8)
    [matcher] = GRAMMARS.matchers("lark", 'start: "a" tail\ntail: "b"?', 1)
    sequence = Sequence.start("s", PROMPT, params, decoding, matcher=matcher)
    deltas = run(make_engine(make_lms(2), eos=frozenset({EOS})), [sequence])["s"]
    assert "".join(TOKENS[token] for token in generated(deltas)) == "ab"
    assert deltas[-1].finish_reason == "stop"


def test_an_error_behind_tokens_that_are_taken_back_is_forgotten() -> None:
    [matcher] = matchers(1)
    [other] = matchers(1)
    start = TOKENS.index("c")
    assert matcher.mask([start]) == other.mask([start])
    assert not any(matcher.mask([start, EOS - 3, EOS - 3]))  # "b" twice is not in the language
    assert matcher.error is not None
    assert matcher.mask([start, start]) == other.mask([start, start])
    assert matcher.error is None


@pytest.mark.parametrize("seed", range(5))
def test_a_matcher_follows_wherever_it_is_led(seed: int) -> None:
    """Masks of any prefix in any order, as after rejections, are those of a new matcher."""
    rng = random.Random(seed)
    [matcher] = matchers(1)
    made: list[int] = []
    for _ in range(200):
        if rng.random() < 0.5:
            matcher.end(made)  # what is verified is looked at before the next mask is wanted
        mask = np.unpackbits(np.frombuffer(matcher.mask(made), np.uint8), bitorder="little")
        expected = [EOS] if EOS in made else allowed(tuple(made))
        assert np.flatnonzero(mask).tolist() == expected
        text = "".join(TOKENS[token] for token in made)
        is_complete = EOS in made or not any(s != text and s.startswith(text) for s in ALL)
        assert (matcher.end(made) is not None) == is_complete
        if rng.random() < 0.3 or len(made) > 5:
            made = made[: rng.randrange(len(made) + 1)]
        else:
            made = [*made, rng.choice(expected)]
    assert matcher.error is None


def test_masks_of_no_more_positions_are_kept_than_can_be_pending() -> None:
    [matcher] = matchers(1)
    for count in range(200):
        matcher.mask([TOKENS.index("c")] * count)
    assert len(matcher._masks) == 64


def test_the_end_of_text_is_needed() -> None:
    with pytest.raises(GrammarError, match="no end-of-text token"):
        make_grammars(frozenset()).matchers("regex", "a", 1)


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("regex", "(a", "unclosed group"),
        ("json", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json", '{"type": "no such type"}', "no such type"),
        ("lark", "nothing: here", "start"),
    ],
)
def test_what_is_no_grammar_is_refused(kind: Kind, source: str, words: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(words)):
        GRAMMARS.matchers(kind, source, 1)


_LETTERS = "abcdefghijklmnop"
_HOSTILE: list[tuple[Kind, str]] = [
    ("regex", "(a|b)*a(a|b){18}"),
    ("regex", "(.|\\n)*a(.|\\n){40}"),
    ("regex", "((a{1,30}){1,30}){1,30}"),
    ("regex", "[^a]{1,5000}[^b]{1,5000}[^c]{1,5000}"),
    ("regex", "(a?){3000}a{3000}"),
    ("regex", "|".join(f".*{a}.{{{n}}}.*" for n, a in enumerate(_LETTERS * 8))),
    ("lark", "start: A\nA: /(.*a.{12})/ & /(.*b.{13})/ & /(.*c.{14})/ & /(.*d.{15})/"),
    ("lark", "start: A\nA: ~/(.*a.{15}b.*)/ & /(.*c.{17})/"),
    ("lark", 'start: x\nx: x x x | /[a-z]+/ | /[a-z]*b/ | ""'),
    (
        "lark",
        "start: a0\n"
        + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(200))
        + 'a200: "x" | ""',
    ),
    (
        "json",
        json.dumps(
            {"allOf": [{"type": "string", "pattern": f".*{c}.{{10}}.*"} for c in _LETTERS[:12]]}
        ),
    ),
    (
        "json",
        json.dumps(
            {
                "type": "object",
                "properties": {
                    f"p{i}": {"type": "string", "pattern": ".*a.{20}b"} for i in range(900)
                },
            }
        ),
    ),
]


@pytest.fixture(scope="module")
def byte_grammars() -> Grammars:
    grammars = tiny_grammars.make_grammars(make_tokenizer())
    grammars.matchers(
        "regex", "a", 1
    )  # what is refused below is not refused for want of a tokenizer
    return grammars


@pytest.mark.parametrize(("kind", "source"), _HOSTILE)
def test_hostile_grammars_cost_little(byte_grammars: Grammars, kind: Kind, source: str) -> None:
    """Refused or followed, by the processor's clock, and no step of others waits long for one."""
    rng, made = random.Random(0), list[int]()
    started = time.thread_time()
    with suppress(GrammarError):
        [matcher] = byte_grammars.matchers(kind, source, 1)
        assert time.thread_time() - started < 10
        while matcher.error is None and matcher.end(made) is None and len(made) < 30:
            started = time.thread_time()
            mask = np.frombuffer(matcher.mask(made), np.uint8)
            assert time.thread_time() - started < 1
            if matcher.error is None:
                ids = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
                made.append(int(rng.choice(ids)))
    assert time.thread_time() - started < 10


def test_grammars_and_refusals_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    compile_one = Grammars._compile

    def count(self: Grammars, kind: Kind, source: str) -> LLMatcher:
        read.append(source)
        return compile_one(self, kind, source)

    monkeypatch.setattr(Grammars, "_compile", count)
    assert GRAMMARS.known_matchers("regex", "a|b{7}", 2) is None
    [matcher] = GRAMMARS.matchers("regex", "a|b{7}", 1)
    known = GRAMMARS.known_matchers("regex", "a|b{7}", 2)
    assert known is not None
    assert [each.mask([]) for each in known] == [matcher.mask([])] * 2
    for find in (GRAMMARS.matchers, GRAMMARS.matchers, GRAMMARS.known_matchers):
        with pytest.raises(GrammarError, match="unclosed group"):
            find("regex", "(abcde", 1)
    assert read == ["a|b{7}", "(abcde"]
    for number in range(40):
        GRAMMARS.matchers("regex", f"a{{{number + 1}}}", 1)
    assert GRAMMARS.known_matchers("regex", "a|b{7}", 1) is None
    assert GRAMMARS.known_matchers("regex", "a{40}", 1) is not None


def test_a_lark_grammar_has_so_many_lines() -> None:
    assert GRAMMARS.matchers("lark", "\n" * 999 + 'start: "a"', 1)
    with pytest.raises(GrammarError, match="1001 lines are more than 1000"):
        GRAMMARS.matchers("lark", "\n" * 1000 + 'start: "a"', 1)


def test_others_run_while_a_grammar_is_read(byte_grammars: Grammars) -> None:
    parts = [{"type": "string", "pattern": f".*{c}.{{9}}.*"} for c in _LETTERS[:13]]
    ticks = 0

    def read() -> None:
        with suppress(GrammarError):
            byte_grammars.matchers("json", json.dumps({"allOf": parts}), 1)

    byte_grammars.prepare()
    thread = threading.Thread(target=read)
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks >= 5


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("choice", json.dumps([f"item {number}" for number in range(6000)])),
        (
            "json",
            json.dumps(
                {
                    "type": "object",
                    "properties": {f"p{i}": {"type": ["integer", "null"]} for i in range(1200)},
                }
            ),
        ),
    ],
)
def test_thousands_of_alternatives_can_be_followed(
    byte_grammars: Grammars, kind: Kind, source: str
) -> None:
    [matcher] = byte_grammars.matchers(kind, source, 1)
    rng, made = random.Random(0), list[int]()
    while matcher.end(made) is None and len(made) < 12:
        mask = np.frombuffer(matcher.mask(made), np.uint8)
        assert matcher.error is None
        ids = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        made.append(int(rng.choice(ids)))


def test_choices_are_taken_literally() -> None:
    texts = ["ab", 'c"', "a\\b", "b\n", "(c|a)"]
    [matcher] = GRAMMARS.matchers("choice", json.dumps(texts), 1)
    mask = np.unpackbits(np.frombuffer(matcher.mask([]), np.uint8), bitorder="little")
    assert np.flatnonzero(mask).tolist() == [0, 1, 2, 3]
    assert matcher.end([2]) == 1
    assert matcher.end([0]) is None
    assert math.isclose(matcher.mask([1])[0], 0)  # no token is the line break


@pytest.mark.parametrize("is_special", [False, True])
def test_texts_may_read_like_special_tokens(is_special: bool) -> None:
    """They are written with other tokens, and can be followed to their ends."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=is_special)], special_tokens=is_special)
    [mark] = tokenizer.encode("<think>", add_special_tokens=False)
    grammars = tiny_grammars.make_grammars(tokenizer)
    [matcher] = grammars.matchers("choice", json.dumps([f"a <think> of {TURN_END}"]), 1)
    generated: list[int] = []
    while matcher.end(generated) is None:
        bits = int.from_bytes(matcher.mask(generated), "little")
        assert bits.bit_count() == 1, "one text has one spelling"
        generated.append(bits.bit_length() - 1)
    assert matcher.error is None
    assert mark not in generated
    assert tokenizer.decode(generated, skip_special_tokens=False) == f"a <think> of {TURN_END}"

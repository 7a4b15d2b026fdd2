"""What the soak asks for: a pool of requests to finish, and requests that must be refused."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

MODEL = "soak"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_WORDS = [
    *("the", "and", "return", "for", "self", "in", "is", "of", "to", "def", "if", "not", "it"),
    *("data", "value", "number", "list", "\u00e9", "\u5b57", "\U0001f600"),
]
_STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "standard"},
    {"strategy": "speculative", "gamma": 3},
    {"strategy": "cos"},
    {"strategy": "cos", "gamma": [3, 2]},
    {"strategy": "mixture", "shared_coins": False},
]


@dataclass(frozen=True, slots=True)
class Job:
    """One request whose text depends on nothing but itself: greedy, or with a seed."""

    url: str
    body: dict[str, Any]


def make_pool(size: int, rng: random.Random) -> list[Job]:
    """Mixed lengths: one in eight prompts is long, and one text in eight."""
    return [_make_job(rng) for _ in range(size)]


def _make_job(rng: random.Random) -> Job:
    length = rng.choice([1, 2, 3, 5, 8, 13, 21, 120])
    text = " ".join(rng.choice(_WORDS) for _ in range(length))
    is_greedy = rng.random() < 0.5
    strategy = rng.choice(_STRATEGIES[:4] if is_greedy else _STRATEGIES)
    body: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": rng.choice([1, 4, 8, 16, 24, 32, 48, 200]),
        "temperature": 0 if is_greedy else rng.choice([0.7, 1.0, 1.3]),
        "seed": rng.randrange(1 << 40),
        "cos": strategy,
        "n": rng.choice([1, 1, 1, 2]),
        "ignore_eos": rng.random() < 0.7,
    }
    if rng.random() < 0.3:
        body["stop"] = rng.sample(["xq", "the", "zz", "(a", "é"], 2)
    if rng.random() < 0.2:
        body["presence_penalty"] = 0.5
    if rng.random() < 0.25:
        return Job(CHAT, {**body, "messages": [{"role": "user", "content": text}]})
    if rng.random() < 0.2 and strategy["strategy"] != "mixture":
        body["logprobs"] = 2
    return Job(COMPLETIONS, {**body, "prompt": text})


# (body or bytes, the status it must get)
INVALID: list[tuple[dict[str, Any] | bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b'{"model": "soak", "prompt": NaN}', 400),
    (b"\xff\xfe", 400),
    ({"prompt": "x"}, 400),
    ({"model": "other", "prompt": "x"}, 404),
    ({"model": MODEL, "prompt": ""}, 400),
    ({"model": MODEL, "prompt": "x", "n": 1000}, 400),
    ({"model": MODEL, "prompt": "x", "temperature": -1}, 400),
    ({"model": MODEL, "prompt": "x", "stop": ["s"] * 100}, 400),
    ({"model": MODEL, "prompt": [10**9]}, 400),
    ({"model": MODEL, "prompt": "word " * 4000}, 400),
    ({"model": MODEL, "prompt": "x", "logit_bias": {"-1": 5}}, 400),
    ({"model": MODEL, "prompt": "x", "cos": {"gamma": 10**6}}, 400),
    ({"model": MODEL, "prompt": "x", "cos": {"strategy": "nonsense"}}, 400),
    ({"model": MODEL, "prompt": "x", "suffix": "y"}, 400),
]

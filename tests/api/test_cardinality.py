"""Whatever clients send, they make no series and no label of their own."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import httpx

from server.metrics import Metrics
from tests.support.api import MODEL, TableApp, make_table_app
from tests.support.live_server import run_server

METHODS = ("GET", "POST", "PUT", "DELETE", "EVILMETHOD", "PATCH", "MKCOL")
HTTP = {"cos_http_requests_total"} | {
    f"cos_http_request_duration_seconds_{part}" for part in ("bucket", "sum", "count")
}
FIELDS = ("user", "request_id", "cache_salt", "seed", "suffix", "stop", "logit_bias", "echo")


def series(metrics: Metrics) -> set[str]:
    lines = metrics.render().decode().splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}


def bodies(choose: random.Random) -> Iterator[object]:
    """Endless; every word of the client's own says that it is evil."""
    while True:
        word = f"evil-{choose.randrange(10**9)}"
        body: dict[str, object] = {
            "model": choose.choice((MODEL, word)),
            "prompt": choose.choice(("1 2 3", word, [1, 2], [word])),
            "max_tokens": choose.choice((1, 3, -1, word)),
            choose.choice(FIELDS): word,
            word: word,
        }
        if choose.random() < 0.5:
            names = ("cos", "standard", "mixture", "single", word)
            body["cos"] = {"strategy": choose.choice(names), "gamma": choose.choice((1, 8, word))}
        yield choose.choice((body, {"model": MODEL, "prompt": "1", "max_tokens": 2}, word, [word]))


def attack(http: httpx.Client, seed: int, count: int) -> None:
    choose = random.Random(seed)
    makers = bodies(choose)
    paths = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/health")
    for number in range(count):
        path = choose.choice(
            (*paths, f"/evil-{choose.randrange(10**9)}", f"/v1/models/evil-{seed}")
        )
        headers = {"X-Request-Id": f"evil-{number}", "Host": f"evil-{number}", "User-Agent": "evil"}
        method = METHODS[number % len(METHODS)] if number % 3 else "POST"
        http.request(method, path, json=next(makers), headers=headers, params={"evil": number})


def test_clients_make_no_series() -> None:
    app: TableApp = make_table_app()
    with run_server(app.app) as url, httpx.Client(base_url=url) as http:
        before = series(app.metrics)
        attack(http, seed=1, count=150)
        new = series(app.metrics) - before
    assert not [line for line in new if "evil" in line.lower()]
    # Of HTTP there is a series for each answer that was given, by the server's own routes.
    assert {line.partition("{")[0] for line in new} == HTTP
    routes = {path.replace("{name}", "{name:path}") for path in app.app.openapi()["paths"]}
    for line in new:
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        assert labels["route"] in routes | {"unmatched"}
        assert labels["method"] in {*METHODS, "HEAD", "OPTIONS", "other"} - {"EVILMETHOD", "MKCOL"}

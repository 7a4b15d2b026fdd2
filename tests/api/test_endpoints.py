"""Everything that is not a completion."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server import __version__
from server.app import Parts, create_app
from server.engine.async_engine import AsyncEngine
from server.errors import ConfigError
from server.metrics import Metrics
from tests.api.conftest import Live
from tests.support.api import MAX_LENGTH, MODEL, DigitTokenizer, make_config, make_engine
from tests.support.live_server import run_server, wait_until


def test_probes(live: Live) -> None:
    for path in ("/health", "/ready", "/ping"):
        response = live.http.get(path)
        assert response.status_code == 200
        assert response.json() == {"status": "ok", "phase": "ready"}
    assert live.http.post("/ping").json()["phase"] == "ready"
    assert live.http.get("/version").json() == {"version": __version__}


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/ping", "/version", "/v1/models", f"/v1/models/{MODEL}"]
)
def test_a_head_has_no_body(live: Live, path: str) -> None:
    response = live.http.head(path)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == live.http.get(path).headers["content-length"]


def test_models(live: Live) -> None:
    [card] = live.http.get("/v1/models").json()["data"]
    assert card["id"] == card["root"] == MODEL
    assert card["max_model_len"] == MAX_LENGTH
    assert card["members"] == ["m0", "m1"]
    assert live.http.get(f"/v1/models/{MODEL}").json() == card
    response = live.http.get("/v1/models/some/other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_metrics_are_valid_and_not_redirected(live: Live) -> None:
    live.complete()
    response = live.http.get("/metrics", follow_redirects=False)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(response.text))
    assert all(family.name.startswith(("cos_", "process_", "python_")) for family in families)


def test_http_metrics_have_bounded_labels(live: Live) -> None:
    for path in ("/v1/models/one", "/v1/models/two", "/no/such", "/neither"):
        live.http.get(path)
    live.http.request("BREW", "/health")
    live.http.post("/tokenize", content=b" " * (live.table.config.http.max_body_bytes + 1))
    # They are counted when the answer is out already.
    labels = {"route": "/tokenize", "method": "POST", "status": "413"}
    wait_until(lambda: live.table.value("cos_http_requests_total", **labels) > 0)
    samples = [
        sample
        for family in live.table.metrics.registry.collect()
        if family.name == "cos_http_requests"
        for sample in family.samples
    ]
    routes = {sample.labels["route"] for sample in samples}
    assert "/v1/models/{name:path}" in routes
    assert "unmatched" in routes
    assert not any("one" in route or "such" in route for route in routes)
    assert "BREW" not in {sample.labels["method"] for sample in samples}


def test_the_openapi_document(live: Live) -> None:
    document: dict[str, Any] = live.http.get("/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions"):
        responses = document["paths"][path]["post"]["responses"]
        assert {"200", "400", "404", "413", "429", "500", "503"} <= set(responses)
        assert "422" not in responses
    schemas = document["components"]["schemas"]
    assert schemas["ErrorBody"]["required"] == ["message", "type", "param", "code"]
    for name in ("CompletionRequest", "ChatCompletionRequest"):
        for field in schemas[name]["properties"].values():
            assert "description" in field


class SlowLoad:
    """A `load` that takes until it is told."""

    def __init__(self, make: Callable[[], Parts]) -> None:
        self.go = threading.Event()
        self._make = make

    def __call__(self) -> Parts:
        assert self.go.wait(20)
        return self._make()


def test_while_loading_probes_answer_and_requests_are_503() -> None:
    config = make_config()
    metrics = Metrics(config)
    load = SlowLoad(
        lambda: Parts(AsyncEngine(make_engine(config, metrics)[0]), DigitTokenizer(), 36)
    )
    app = create_app(config, load=load, metrics=metrics)
    with run_server(app, phase="loading") as url, httpx.Client(base_url=url) as http:
        assert http.get("/health").status_code == 200
        ready = http.get("/ready")
        assert (ready.status_code, ready.json()["phase"]) == (503, "loading")
        body = {"model": MODEL, "prompt": "1"}
        for answer in (http.post("/v1/completions", json=body), http.get("/v1/models")):
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["code"] == "unavailable"
        load.go.set()
        wait_until(lambda: http.get("/ready").status_code == 200)
        assert http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("error", [ConfigError("no such file"), RuntimeError("bug")])
def test_a_failed_load_turns_health_red(error: Exception) -> None:
    failures: list[BaseException] = []

    def load() -> Parts:
        raise error

    app = create_app(make_config(), load=load, on_failure=failures.append)
    with run_server(app, phase="failed") as url, httpx.Client(base_url=url) as http:
        assert http.get("/health").status_code == 503
        assert http.post("/v1/completions", json={"model": MODEL, "prompt": "1"}).status_code == 500
    assert failures == [error]


def test_draining_refuses_new_requests_and_finishes_running_ones(start) -> None:
    live = start()
    live.table.set_pace(0.02)
    body = {"model": MODEL, "prompt": "1", "max_tokens": 40, "stream": True, "ignore_eos": True}
    with live.http.stream("POST", "/v1/completions", json=body) as running:
        live.table.service.drain()
        ready = live.http.get("/ready")
        assert (ready.status_code, ready.json()["phase"]) == (503, "draining")
        assert live.http.get("/health").status_code == 200
        assert live.post().status_code == 503
        raw = running.read()
    assert b'"finish_reason":"length"' in raw
    assert raw.endswith(b"data: [DONE]\n\n")


def test_a_configuration_that_contradicts_itself() -> None:
    combination = {"method": "weighted", "weights": [0.5, 0.25, 0.25]}
    with pytest.raises(ConfigError, match="3 weights for 2 models"):
        create_app(make_config(combination=combination))
    contrastive = {"method": "contrastive"}
    with pytest.raises(ConfigError, match="mixture needs"):
        create_app(make_config(combination=contrastive, decoding={"strategy": "mixture"}))

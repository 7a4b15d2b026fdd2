"""Traces: what becomes a span, and that spans leave by OTLP."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.config import TracingConfig
from server.errors import ConfigError
from server.tracing import RequestTracer, make_tracer
from tests.support.api import IMPOSSIBLE, MODEL, make_table_app
from tests.support.live_server import run_server, wait_until

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
BODY = {"model": MODEL, "prompt": "1 2 3", "max_tokens": 8, "ignore_eos": True}


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def client(spans: InMemorySpanExporter) -> Iterator[httpx.Client]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    app = make_table_app(tracer=RequestTracer(provider))
    with run_server(app.app) as url, httpx.Client(base_url=url) as http:
        yield http


def finished(spans: InMemorySpanExporter, num: int) -> dict[str, ReadableSpan]:
    """By name, once there are `num`: the last ones may end after the answer."""
    wait_until(lambda: len(spans.get_finished_spans()) >= num)
    found = spans.get_finished_spans()
    assert len(found) == num
    return {span.name: span for span in found}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_and_its_parts(
    client: httpx.Client, spans: InMemorySpanExporter, stream: bool
) -> None:
    client.post("/v1/completions", json={**BODY, "stream": stream}).raise_for_status()
    found = finished(spans, 4)
    request = found[f"text_completion {MODEL}"]
    assert request.kind is SpanKind.SERVER
    assert request.parent is None
    assert request.attributes is not None
    assert request.attributes["gen_ai.usage.output_tokens"] == 8
    assert request.attributes["gen_ai.response.finish_reasons"] == ("length",)
    parts = [found[name] for name in ("queue", "prefill", "decode")]
    assert all(part.parent is not None and request.context is not None for part in parts)
    assert {part.parent.span_id for part in parts if part.parent} == {request.context.span_id}
    # One after the other, from the beginning of the request to its end.
    moments = [request.start_time, *(part.end_time for part in parts)]
    assert [part.start_time for part in parts] == moments[:-1]
    assert moments[-1] == request.end_time
    assert moments == sorted(moments, key=lambda moment: moment or 0)


def test_the_trace_of_the_client_goes_on(client: httpx.Client, spans: InMemorySpanExporter) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    client.post("/v1/completions", json=BODY, headers=headers).raise_for_status()
    found = finished(spans, 4)
    request = found[f"text_completion {MODEL}"]
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT_ID
    assert {f"{span.context.trace_id:032x}" for span in found.values() if span.context} == {
        TRACE_ID
    }


@pytest.mark.parametrize("header", ["00-0-0-01", "é", f"00-{'0' * 32}-{PARENT_ID}-01", "x" * 5000])
def test_a_broken_traceparent_is_ignored(
    client: httpx.Client, spans: InMemorySpanExporter, header: str
) -> None:
    headers = [(b"traceparent", header.encode("latin-1"))]
    client.post("/v1/completions", json=BODY, headers=headers).raise_for_status()
    assert finished(spans, 4)[f"text_completion {MODEL}"].parent is None


def test_a_request_without_a_token_has_no_parts(
    client: httpx.Client, spans: InMemorySpanExporter
) -> None:
    body = {**BODY, "max_tokens": 1, **IMPOSSIBLE}
    assert client.post("/v1/completions", json=body).status_code == 500
    [request] = finished(spans, 1).values()
    assert request.status.status_code is StatusCode.ERROR


class Collector(HTTPServer):
    """Takes traces by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CollectorHandler)
        self.names: list[str] = []
        self.services: set[str] = set()


class CollectorHandler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            raise AssertionError("nothing asked for compression")
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            attributes = {
                each.key: each.value.string_value for each in resource.resource.attributes
            }
            self.server.services.add(attributes["service.name"])
            for scope in resource.scope_spans:
                self.server.names += [span.name for span in scope.spans]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_configured_traces_reach_a_collector_before_the_server_ends() -> None:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        app = make_table_app(tracing={"endpoint": endpoint})
        with run_server(app.app) as url:
            httpx.post(f"{url}/v1/completions", json=BODY).raise_for_status()
        collector.shutdown()
        thread.join()
    assert sorted(collector.names) == ["decode", "prefill", "queue", f"text_completion {MODEL}"]
    assert collector.services == {"cos-server"}


def test_a_collector_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.app._TRACING_SECONDS", 0.05)
    hangs = threading.Event()
    tracer = make_tracer(TracingConfig(endpoint="http://unused/"), InMemorySpanExporter())
    assert tracer is not None
    closed = tracer.close
    monkeypatch.setattr(tracer, "close", lambda: (hangs.wait(60), closed()))
    started = time.monotonic()
    with run_server(make_table_app(tracer=tracer).app) as url:
        httpx.get(f"{url}/health").raise_for_status()
    hangs.set()
    assert time.monotonic() - started < 30


def test_clients_decide_about_their_traces() -> None:
    spans = InMemorySpanExporter()
    tracer = make_tracer(TracingConfig(endpoint="http://unused/", sample_ratio=0), spans)
    app = make_table_app(tracer=tracer)
    with run_server(app.app) as url:
        for flags in ("00", "01"):
            headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-{flags}"}
            httpx.post(f"{url}/v1/completions", json=BODY, headers=headers).raise_for_status()
        httpx.post(f"{url}/v1/completions", json=BODY).raise_for_status()
    finished(spans, 4)


def test_off_by_default() -> None:
    assert make_tracer(TracingConfig()) is None


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match="pip install opentelemetry-sdk"):
        make_tracer(TracingConfig(endpoint="http://unused/"))

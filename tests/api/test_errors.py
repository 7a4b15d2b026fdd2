"""Every refusal: its status, its field, its code, in OpenAI's envelope."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server.api.errors import MAX_INPUT_CHARS, MAX_PROBLEMS, describe
from server.api.reply import Reply
from server.api.unsupported import REFUSED_IN_COMPLETIONS
from server.core.output import TokenDelta
from server.core.sequence import Sequence
from server.engine.scheduler import Scheduler
from server.errors import EngineDead, EngineDraining, EngineOverloaded, GenerationFailed
from tests.api.conftest import Live
from tests.support.api import EOS, MAX_LENGTH, MODEL, VOCAB_SIZE, DigitTokenizer
from tests.support.live_server import wait_until

URL = "/v1/completions"
MESSAGES = [{"role": "user", "content": "1"}]


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] is None or isinstance(body["error"]["code"], str)
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["1", ""]}, "prompt.1"),
        ({"prompt": ["1", 2]}, "prompt"),
        ({"prompt": [1, 2.5]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [VOCAB_SIZE]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1] * MAX_LENGTH}, "prompt"),
        ({"prompt": ["1"] * 65}, "prompt"),
        ({"prompt": ["1"] * 64, "n": 3}, "prompt"),
        ({"model": None}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"prompt": "1" * ((1 << 20) + 1)}, "prompt"),
        ({"prompt": ["1" * (1 << 19)] * 3}, "prompt"),
        ({"priority": 1}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"logprobs": "all"}, "logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [EOS], "min_tokens": 1}, "allowed_token_ids"),
        (
            {"allowed_token_ids": [EOS, 3], "stop_token_ids": [3], "min_tokens": 1},
            "allowed_token_ids",
        ),
        (
            {"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 1, "ignore_eos": True},
            "allowed_token_ids",
        ),
        ({"stop_token_ids": list(range(VOCAB_SIZE)), "min_tokens": 1}, "stop_token_ids"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "two words"}, "request_id"),
        ({"request_id": "x\n"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"return_token_ids": 1}, "return_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"stream": False, "stream_options": {}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        ({"cos": {"gama": 1}}, "cos.gama"),
        ({"cos": {"gamma": 0}}, "cos.gamma"),
        ({"cos": {"gamma": 9}}, "cos.gamma"),
        ({"cos": {"gamma": [1, 2, 3]}}, "cos.gamma"),
        ({"cos": {"kappa": 9, "strategy": "mixture"}}, "cos.kappa"),
        ({"cos": {"strategy": "best"}}, "cos.strategy"),
        ({"cos": {"combination": {"method": "weighted", "weights": [1]}}}, "cos.combination"),
        ({"cos": {"combination": {"method": "contrastive", "mu": True}}}, "cos.combination"),
        ({"cos": {"combination": {"method": "contrastive", "mu": "1"}}}, "cos.combination"),
        (
            {"cos": {"combination": {"method": "weighted", "weights": [0.5, "0.5"]}}},
            "cos.combination",
        ),
        ({"prompt": [[1]] * ((1 << 14) + 1)}, "prompt"),
        ({"prompt": ["1"] * ((1 << 14) + 1)}, "prompt"),
        ({"cos": {"combination": {"method": "weighted", "weights": [1, 1]}}}, "cos.combination"),
        ({"cos": {"combination": {"method": "linear", "weights": [0, 0]}}}, "cos.combination"),
        ({"cos": {"combination": {"method": "linear", "weights": [1e30, 1]}}}, "cos.combination"),
        (
            {"cos": {"combination": {"method": "contrastive", "mu": -1}}},
            "cos.combination.mu",
        ),
        ({"cos": {"strategy": "mixture"}, "temperature": 0}, "temperature"),
        ({"cos": {"strategy": "mixture"}, "logprobs": 1}, "logprobs"),
        (
            {"cos": {"strategy": "mixture", "combination": {"method": "contrastive"}}},
            "cos.combination",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_malformed_requests_are_400(
    live: Live, body: dict[str, Any], param: str, stream: bool
) -> None:
    response = live.post(**{"stream": stream, **body})
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) < 1000


def test_error_messages_say_which_bound(live: Live) -> None:
    assert "less_than_equal" in error_of(live.post(seed=2**63))["message"]
    assert "greater_than_equal" in error_of(live.post(temperature=-1))["message"]
    assert "limit 20" in error_of(live.post(logprobs=21))["message"]


@pytest.mark.parametrize("name", sorted(REFUSED_IN_COMPLETIONS))
def test_what_is_not_supported_is_refused_by_name(live: Live, name: str) -> None:
    response = live.post(**{name: {"some": "value"}})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_values_that_ask_for_nothing_are_taken(live: Live) -> None:
    """As clients of other servers send them, all at once."""
    neutral: dict[str, Any] = {
        "truncation_side": "left",
        "user": {"any": ["thing"]},
        "do_sample": True,
        "num_beams": 1,
        "no_repeat_ngram_size": 0,
        "typ_p": 1.0,
        "xtc_probability": 0,
        "xtc_threshold": 0.1,
        "dry_multiplier": 0.0,
        "dry_base": 1.75,
        "mirostat_mode": 0,
    }
    assert live.post(max_tokens=1, **neutral).status_code == 200
    for name in ("do_sample", "num_beams", "dry_multiplier"):
        assert error_of(live.post(**{**neutral, name: 0.5}))["param"] == name


def test_null_asks_for_nothing(live: Live) -> None:
    options = {"include_usage": None, "continuous_usage_stats": None}
    streamed = live.post(max_tokens=1, stream=True, stream_options=options)
    assert streamed.status_code == 200
    assert '"usage"' not in streamed.text
    assert live.post(max_tokens=1, **dict.fromkeys(REFUSED_IN_COMPLETIONS)).status_code == 200


@pytest.mark.parametrize(
    ("number", "field"),
    [
        *((number, "temperature") for number in ("NaN", "Infinity", "-Infinity", "1e999")),
        *((number, "unknown_field") for number in ("NaN", "Infinity", "-Infinity")),
    ],
)
def test_numbers_are_finite(live: Live, number: str, field: str) -> None:
    raw = f'{{"model": "table", "prompt": "1", "{field}": {number}}}'
    headers = {"content-type": "application/json"}
    assert live.http.post(URL, content=raw, headers=headers).status_code == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model":"table","prompt":"\\ud800"}',
    ],
)
def test_what_is_no_json_object_is_400(live: Live, raw: bytes) -> None:
    response = live.http.post(URL, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_the_wrong_content_type_is_400(live: Live, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = live.http.post(URL, content=b'{"model":"table","prompt":"1"}', headers=headers)
    assert response.status_code == 400
    assert "application/json" in error_of(response)["message"]


def test_input_is_not_echoed_at_length(live: Live) -> None:
    secret = "x" * 100_000
    for body in ({"prompt": {secret: 1}}, {"temperature": secret}, {"model": secret}):
        assert len(live.post(**body).content) < 4 * MAX_INPUT_CHARS + 500
    digits = "7" * 4200
    for field in ("n", "logprobs", "top_k", "prompt_logprobs", "truncate_prompt_tokens"):
        raw = f'{{"model": "table", "prompt": "1", "n": 200, "{field}": {digits}}}'
        response = live.http.post(URL, content=raw, headers={"content-type": "application/json"})
        assert len(response.content) < 500, field
    assert len(live.post(prompt=[10**4000]).content) < 500
    many = {"logit_bias": {str(i): "x" * 1000 for i in range(1000)}}
    message = error_of(live.post(**many))["message"]
    assert message.count(";") <= 2 * MAX_PROBLEMS
    assert len(message) < MAX_PROBLEMS * (2 * MAX_INPUT_CHARS + 200)


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/chat/completions", {"messages": [1] * 4000}, "messages.0"),
        ("/v1/chat/completions", {"messages": [{}] * 4000}, "messages.0.role"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [1] * 5000}]},
            "messages.0.content.0",
        ),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": [1] * 128}, "tools.0"),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "chat_template_kwargs": {str(i): [] for i in range(20_000)}},
            "chat_template_kwargs",
        ),
        ("/v1/completions", {"prompt": [["a"]] * 5000}, "prompt"),
        ("/v1/completions", {"stop_token_ids": ["a"] * 5000}, "stop_token_ids.0"),
        ("/v1/completions", {"bad_words": [1] * 5000}, "bad_words.0"),
        ("/v1/completions", {"logit_bias": dict.fromkeys(map(str, range(20_000)))}, "logit_bias"),
        (
            "/v1/completions",
            {"cos": {"combination": {"method": "weighted", "weights": ["a"] * 5000}}},
            "cos.combination.weights.0",
        ),
        ("/v1/completions", {"cos": dict.fromkeys(map(str, range(20_000)))}, "cos"),
        (
            "/v1/completions",
            {"cos": {"combination": dict.fromkeys(map(str, range(20_000)), 0)}},
            "cos.combination",
        ),
        (
            "/v1/completions",
            {"structured_outputs": dict.fromkeys(map(str, range(20_000)))},
            "structured_outputs",
        ),
        ("/detokenize", {"tokens": ["a"] * 5000}, "tokens.0"),
    ],
)
def test_thousands_of_problems_are_told_by_the_first(
    live: Live, path: str, body: dict[str, Any], named: str
) -> None:
    """Describing each of them would hold everybody up for seconds."""
    response = live.http.post(path, json={"model": MODEL, "prompt": "1", **body})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, named)
    assert ".1" not in error["message"]


def test_context_length(live: Live) -> None:
    error = error_of(live.post(prompt=[1] * MAX_LENGTH))
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 256" in error["message"]


def test_unknown_model_is_404(live: Live) -> None:
    response = live.post(model="gpt-4")
    assert response.status_code == 404
    error = error_of(response)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_an_unknown_model_is_404_whatever_else_is_wrong(live: Live) -> None:
    """Gateways go on to the next server at 404, and at no other."""
    tool = {"type": "function", "function": {"name": "f"}}
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": "1"}], "tools": [tool]}
    response = live.http.post("/v1/chat/completions", json=body | {"tool_choice": "required"})
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("written", "field"),
    [
        ({"type": "json_object", "schema": 5}, "response_format.schema"),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": None}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_what_is_no_schema_is_one_problem_of_its_field(
    live: Live, written: dict[str, object], field: str
) -> None:
    error = error_of(live.post(prompt="1", response_format=written))
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: Input should be a JSON schema")


def test_unknown_route_is_404_and_wrong_method_405(live: Live) -> None:
    assert error_of(live.http.get("/v1/nothing"))["type"] == "invalid_request_error"
    assert live.http.get("/v1/nothing").status_code == 404
    assert live.http.get("/v1/models/").status_code == 404
    response = live.http.get(URL)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert live.http.put("/ping").headers["allow"] == "GET, HEAD, POST"
    error_of(response)


def test_a_large_body_is_413_declared_or_not(live: Live) -> None:
    size = live.table.config.http.max_body_bytes + 1

    def chunks():
        for _ in range(size // 65536 + 1):
            yield b" " * 65536

    headers = {"content-type": "application/json"}
    for content in (b" " * size, chunks()):
        response = live.http.post(URL, content=content, headers=headers)
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"


def test_priority_where_the_server_takes_it(start) -> None:
    live = start(http={"allow_priority": True})
    assert live.post(priority=-7, max_tokens=1).status_code == 200


def test_a_full_queue_is_429(start) -> None:
    live = start(engine={"max_sequences": 1, "max_waiting": 2})
    live.table.set_pace(0.02)
    with live.http.stream(
        "POST",
        URL,
        json={
            "model": "table",
            "prompt": "1",
            "n": 2,
            "stream": True,
            "max_tokens": 200,
            "ignore_eos": True,
        },
    ) as running:
        assert running.status_code == 200
        for stream in (False, True):
            response = live.post(n=2, stream=stream)
            assert response.status_code == 429
            assert error_of(response)["code"] == "queue_full"
            assert int(response.headers["retry-after"]) > 0
        # Told before the prompt is tokenised, which here would fail.
        assert live.post(n=2, prompt="?").status_code == 429
    live.wait_idle()
    assert live.table.value("cos_requests_rejected_total", reason="queue_full") == 3


def test_a_request_that_can_never_fit_the_queue_is_400(start) -> None:
    live = start(engine={"max_sequences": 1, "max_waiting": 2})
    response = live.post(n=4)
    assert response.status_code == 400
    assert "limit 3" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (EngineOverloaded("full"), 429),
        (EngineDraining("bye"), 503),
        (EngineDead("the engine has failed: secret"), 500),
        (GenerationFailed("nan"), 500),
        (RuntimeError("secret path /root"), 500),
    ],
)
def test_errors_of_the_server(error: Exception, status: int) -> None:
    code, body = describe(error)
    assert code == status
    assert "secret" not in body.error.message


def test_request_ids_are_echoed_or_made(live: Live) -> None:
    given = live.http.get("/health", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    for bad in ("x" * 129, "with space"):
        made = live.http.get("/health", headers={"x-request-id": bad})
        assert made.headers["x-request-id"].startswith("req-")
    assert live.post(model="nope").headers["x-request-id"]


def beside(live: Live, call: Callable[[], None]) -> None:
    """Run `call` while another request decodes, whose text must be what it is alone."""
    body = {"max_tokens": 40, "ignore_eos": True, "seed": 7}
    expected = live.complete(**body)["choices"]
    live.table.set_pace(0.005)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(live.complete, **body)
        wait_until(lambda: live.table.engine.has_work)
        call()
        assert other.result()["choices"] == expected
    live.wait_idle()


def test_an_error_in_the_tokeniser_costs_one_request(start, monkeypatch) -> None:
    live = start()
    original = DigitTokenizer.encode

    def raising(self: DigitTokenizer, sequence: str, **options: bool) -> Any:
        if sequence == "3 3":
            raise RuntimeError("told to fail")
        return original(self, sequence, **options)

    monkeypatch.setattr(DigitTokenizer, "encode", raising)

    def call() -> None:
        for stream in (False, True):
            response = live.post(prompt="3 3", stream=stream)
            assert response.status_code == 500
            assert error_of(response)["code"] == "internal_error"

    beside(live, call)


def test_what_cannot_be_queued_costs_one_request(start, monkeypatch) -> None:
    live = start()
    original = Scheduler.add

    def raising(self: Scheduler, sequence: Sequence) -> None:
        if sequence.params.seed == 99:
            raise RuntimeError("told to fail")
        original(self, sequence)

    monkeypatch.setattr(Scheduler, "add", raising)

    def call() -> None:
        for stream in (False, True):
            response = live.post(seed=99, stream=stream)
            assert response.status_code == 500
            assert error_of(response)["code"] == "generation_failed"

    beside(live, call)


def test_an_error_in_writing_an_answer_costs_one_request(start, monkeypatch) -> None:
    """After its third piece, in a stream and in a whole answer."""
    live = start()
    original = Reply.take

    def raising(self: Reply, delta: TokenDelta) -> Any:
        if self._generation.sequences[0].params.seed == 99 and self._num_tokens > 2:
            raise RuntimeError("told to fail")
        return original(self, delta)

    monkeypatch.setattr(Reply, "take", raising)

    def call() -> None:
        body = {"seed": 99, "max_tokens": 200, "ignore_eos": True}
        assert live.stream(**body)[-1]["error"]["code"] == "internal_error"
        response = live.post(**body)
        assert response.status_code == 500
        assert error_of(response)["code"] == "internal_error"

    beside(live, call)


def test_a_bug_is_a_500_that_says_nothing_of_itself(start, monkeypatch) -> None:
    live = start()
    monkeypatch.setattr(live.table.service, "decoding", None)
    response = live.http.post(
        URL, json={"model": "table", "prompt": "1"}, headers={"x-request-id": "abc-2"}
    )
    assert response.status_code == 500
    assert error_of(response) == {
        "message": "internal server error",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert response.headers["x-request-id"] == "abc-2"
    assert live.http.get("/health").status_code == 200

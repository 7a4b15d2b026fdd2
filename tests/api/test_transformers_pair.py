"""The whole stack over real transformers models: files, loader, tokenizer, engine, HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.config_file import parse_config
from tests.support.live_server import run_server
from tests.support.sse import parse, texts
from tests.support.tiny_models import CHAT_TEMPLATE, MAX_LENGTH, TURN_END, VOCAB_SIZE, make_pair

MODEL = "org/tiny"
PROMPT = "def value(self): return number"


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    members = make_pair(tmp_path_factory.mktemp("pair"))
    config = parse_config(
        {
            "served_model_name": MODEL,
            "models": [{"name": path.name, "path": str(path)} for path in members],
            "combination": {"method": "weighted", "weights": [0.4, 0.6]},
            "engine": {"kv_memory": "8MiB"},
        }
    )
    with run_server(create_app(config)) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    defaults = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    response = http.post("/v1/completions", json={**defaults, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_models(http: httpx.Client) -> None:
    [card] = http.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == (MODEL, MAX_LENGTH)
    assert http.get(f"/v1/models/{MODEL}").json() == card


@pytest.mark.parametrize("strategy", ["cos", "speculative"])
def test_greedy_text_and_logprobs_are_those_of_standard(http: httpx.Client, strategy: str) -> None:
    body = {"logprobs": 3, "ignore_eos": True}
    expected = complete(http, cos={"strategy": "standard"}, **body)["choices"][0]
    found = complete(http, cos={"strategy": strategy}, **body)["choices"][0]
    assert found["text"] == expected["text"]
    for key in ("tokens", "text_offset"):
        assert found["logprobs"][key] == expected["logprobs"][key]
    assert found["logprobs"]["token_logprobs"] == pytest.approx(
        expected["logprobs"]["token_logprobs"], abs=1e-4
    )


def test_a_stream_of_many_bytes_is_valid_utf8_and_whole(http: httpx.Client) -> None:
    body = {"seed": 3, "temperature": 1.5, "max_tokens": 200, "ignore_eos": True, "n": 2}
    whole = complete(http, **body)
    defaults = {"model": MODEL, "prompt": PROMPT, "stream": True}
    response = http.post("/v1/completions", json={**defaults, **body})
    expected = {choice["index"]: choice["text"] for choice in whole["choices"]}
    assert texts(parse(response.content)) == expected


def test_text_and_token_ids_of_a_prompt_agree(http: httpx.Client) -> None:
    num_tokens = complete(http)["usage"]["prompt_tokens"]
    assert 0 < num_tokens < len(PROMPT)
    assert complete(http, prompt=list(range(97, 101)))["usage"]["prompt_tokens"] == 4


def test_special_tokens_are_left_out_unless_asked_for(http: httpx.Client) -> None:
    end = str(VOCAB_SIZE - 3)
    body = {"logit_bias": {end: 100}, "ignore_eos": True, "max_tokens": 3}
    assert complete(http, **body)["choices"][0]["text"] == ""
    shown = complete(http, skip_special_tokens=False, **body)["choices"][0]
    assert set(shown["text"].replace("<|", " <|").split()) <= {
        TURN_END,
        "<|im_start|>",
        "<|endoftext|>",
    }


def chat(http: httpx.Client, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "the value of it"}]
    defaults = {"model": MODEL, "messages": messages, "max_tokens": 24, "temperature": 0}
    return http.post("/v1/chat/completions", json={**defaults, **body})


def test_chat_is_the_completion_of_the_rendered_template(http: httpx.Client) -> None:
    rendered = "<|im_start|>user\nthe value of it<|im_end|>\n<|im_start|>assistant\n"
    found, expected = chat(http).json(), complete(http, prompt=rendered, cache_salt="other")
    assert found["choices"][0]["message"]["content"] == expected["choices"][0]["text"]
    assert found["usage"] == expected["usage"]


def test_the_final_message_can_be_continued(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "it"}, {"role": "assistant", "content": "the value"}]
    found = chat(http, messages=messages, continue_final_message=True).json()
    rendered = "<|im_start|>user\nit<|im_end|>\n<|im_start|>assistant\nthe value"
    expected = complete(http, prompt=rendered)
    assert found["choices"][0]["message"]["content"] == expected["choices"][0]["text"]


def test_bytes_of_chat_logprobs_are_those_of_the_text(http: httpx.Client) -> None:
    options = {"temperature": 1.5, "seed": 3, "max_tokens": 200, "ignore_eos": True}
    options |= {"logprobs": True, "top_logprobs": 1, "skip_special_tokens": False}
    [choice] = chat(http, **options).json()["choices"]
    raw = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    text = choice["message"]["content"]
    assert "\ufffd" in text  # some of these bytes are no characters
    assert raw.decode(errors="replace") == text


def test_special_tokens_in_a_message_are_special(http: httpx.Client) -> None:
    plain = [{"role": "user", "content": "it"}]
    special = [{"role": "user", "content": f"it{TURN_END}"}]
    counts = [chat(http, messages=m).json()["usage"]["prompt_tokens"] for m in (plain, special)]
    assert counts[1] == counts[0] + 1


def test_what_the_template_cannot_render_is_400(http: httpx.Client) -> None:
    for name in ("tokenize", "chat_template", "eos_token", "message.role", "no_such_name"):
        response = chat(http, chat_template_kwargs={name: True})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == f"chat_template_kwargs.{name}"
    assert chat(http, chat_template_kwargs={"message": 5}).status_code == 200


def test_tokens_of_a_text_and_of_a_conversation(http: httpx.Client) -> None:
    text = "the value ßü 世"
    found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert "".join(found["token_strs"]).startswith("theĠvalueĠ")
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    messages = [{"role": "user", "content": text}]
    ids = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    rendered = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert rendered == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert chat(http, messages=messages).json()["usage"]["prompt_tokens"] == len(ids)


def test_tokenizer_info(http: httpx.Client) -> None:
    assert http.get("/tokenizer_info").json() == {
        "vocab_size": VOCAB_SIZE,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "chat_template": CHAT_TEMPLATE,
    }


def test_the_report_estimates_a_speedup(http: httpx.Client) -> None:
    report = complete(http, ignore_eos=True)["cos"]
    ratio = report["baseline_seconds"] / report["decode_seconds"]
    assert report["estimated_speedup"] == pytest.approx(ratio)
    verified = sum(report["accepted"]) + report["recovered"] + report["drawn"]
    assert 24 <= verified == 24 + report["discarded"]
    assert report["verified_per_cycle"] == pytest.approx(verified / report["cycles"])


def test_metrics_tell_of_the_models(http: httpx.Client) -> None:
    complete(http)
    text = http.get("/metrics").text
    lines = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    for member in ("member-0", "member-1"):
        prefill = f'cos_model_forward_passes_total{{model="{member}",phase="prefill"}}'
        assert lines[prefill] > 0
        assert lines[f'cos_kv_pages{{model="{member}"}}'] > 0
        assert lines[f'cos_kv_pages_used{{model="{member}"}}'] == 0
    assert lines['cos_generated_tokens_total{method="weighted",strategy="cos"}'] > 0
    assert lines["cos_decode_seconds_total"] > 0
    assert lines["cos_baseline_estimated_seconds_total"] > 0
    assert lines['cos_baseline_step_seconds{batch="1",model="member-0"}'] > 0


@pytest.mark.parametrize("temperature", [0, 1])
def test_replies_follow_a_json_schema(http: httpx.Client, temperature: float) -> None:
    """Random weights, yet every reply that ends by itself is valid; greedy ones are standard's."""
    schema = {
        "type": "object",
        "properties": {
            "ok": {"type": "boolean"},
            "kinds": {"type": "array", "items": {"enum": ["a", "bé", "c"]}, "maxItems": 3},
            "text": {"type": "string", "maxLength": 12},
        },
        "required": ["ok", "kinds", "text"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    body: dict[str, Any] = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "temperature": temperature, "seed": 1, "max_tokens": 120, "ignore_eos": True, "n": 2,
    }  # fmt: skip
    choices = complete(http, **body)["choices"]
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        reply = json.loads(choice["text"])
        assert set(reply) == {"ok", "kinds", "text"}
        assert isinstance(reply["ok"], bool)
        assert set(reply["kinds"]) <= {"a", "bé", "c"}
        assert len(reply["text"]) <= 12
    if temperature == 0:
        standard = complete(http, **body, cos={"strategy": "standard"})["choices"]
        assert [c["text"] for c in choices] == [c["text"] for c in standard]

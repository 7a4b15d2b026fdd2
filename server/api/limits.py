"""This server's limits, checked before any work is done or copied.

Everything here raises RequestError naming the field and the limit.
"""

from __future__ import annotations

from server.api.codec import Codec
from server.api.protocol import CompletionRequest
from server.config import HttpConfig, ServerConfig
from server.errors import ContextLengthExceeded, RequestError


def check_limits(request: CompletionRequest, config: ServerConfig) -> None:
    """Counts and lengths, and fields that need one another."""
    http, engine = config.http, config.engine
    n, num_prompts = request.n or 1, _num_prompts(request)
    _at_most("n", n, http.max_n)
    _at_most("prompt", num_prompts, http.max_prompts, "prompts")
    _at_most("prompt", num_prompts * n, http.max_choices, "prompts times n")
    # The queue could never take more, however often the client tried again.
    _at_most("n", num_prompts * n, engine.max_sequences + engine.max_waiting, "choices")
    _at_most("logprobs", request.logprobs or 0, http.max_logprobs)
    _at_most("logit_bias", len(request.logit_bias or ()), http.max_logit_bias, "entries")
    _check_stop(request, http)
    _check_lengths(request)
    _check_stream_options(request)


def check_vocabulary(request: CompletionRequest, codec: Codec) -> None:
    """Token ids against the vocabulary that all models share."""
    codec.check_ids(request.stop_token_ids or [], "stop_token_ids")
    codec.check_ids(request.allowed_token_ids or [], "allowed_token_ids")
    codec.check_ids([token_id for token_id, _ in logit_bias(request)], "logit_bias")
    if request.allowed_token_ids == []:
        raise RequestError("allowed_token_ids must not be empty", param="allowed_token_ids")


def check_prompt(token_ids: list[int], max_length: int, param: str) -> None:
    """One token at least must be left to generate."""
    if not token_ids:
        raise RequestError(f"{param} must not be empty", param=param)
    if len(token_ids) >= max_length:
        raise ContextLengthExceeded(len(token_ids), max_length, param)


def logit_bias(request: CompletionRequest) -> list[tuple[int, float]]:
    """(token id, bias) pairs; JSON has no integer keys. Raises RequestError."""
    pairs = []
    for key, bias in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise RequestError(f"logit_bias: {key[:200]!r} is not a token id", param="logit_bias")
        pairs.append((int(key), bias))
    return pairs


def stop_strings(request: CompletionRequest) -> tuple[str, ...]:
    if request.stop is None:
        return ()
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)


def _num_prompts(request: CompletionRequest) -> int:
    prompt = request.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return 1
    return len(prompt)


def _check_stop(request: CompletionRequest, http: HttpConfig) -> None:
    stop = stop_strings(request)
    _at_most("stop", len(stop), http.max_stop, "strings")
    if "" in stop:
        raise RequestError("stop must not contain an empty string", param="stop")
    _at_most("stop", max(map(len, stop), default=0), http.max_stop_chars, "characters in a string")
    _at_most("stop_token_ids", len(request.stop_token_ids or ()), http.max_logit_bias, "ids")


def _check_lengths(request: CompletionRequest) -> None:
    max_tokens, min_tokens = request.max_tokens, request.min_tokens or 0
    if max_tokens == 0:
        raise RequestError("max_tokens must be at least 1 without echo", param="max_tokens")
    if min_tokens > (16 if max_tokens is None else max_tokens):
        raise RequestError(
            f"min_tokens {min_tokens} is above max_tokens {max_tokens or 16}", param="min_tokens"
        )


def _check_stream_options(request: CompletionRequest) -> None:
    options = request.stream_options
    if options is None:
        return
    if not request.stream:
        raise RequestError("stream_options needs stream=true", param="stream_options")
    if options.continuous_usage_stats and not options.include_usage:
        raise RequestError(
            "continuous_usage_stats needs include_usage=true",
            param="stream_options.continuous_usage_stats",
        )


def _at_most(param: str, value: int, limit: int, unit: str = "") -> None:
    if value > limit:
        of = f" {unit}" if unit else ""
        raise RequestError(
            f"{param}: {value}{of} is above this server's limit {limit}", param=param
        )

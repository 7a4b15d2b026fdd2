"""This server's limits, checked before any work is done or copied.

Everything here raises RequestError naming the field and the limit.
"""

from __future__ import annotations

from server.api.codec import Codec
from server.api.protocol import GenerationRequest
from server.config import HttpConfig, ServerConfig
from server.errors import ContextLengthExceeded, RequestError, UnsupportedParameter


def check_limits(request: GenerationRequest, config: ServerConfig) -> None:
    """Counts and lengths, and fields that need one another."""
    http, engine = config.http, config.engine
    n, num_prompts = request.n or 1, request.num_prompts
    _at_most("n", n, http.max_n)
    _at_most("prompt", num_prompts, http.max_prompts, "prompts")
    choices_field = "n" if num_prompts == 1 else "prompt"
    _at_most(choices_field, num_prompts * n, http.max_choices, "prompts times n")
    # The queue could never take more, however often the client tried again.
    _at_most("n", num_prompts * n, engine.max_sequences + engine.max_waiting, "choices")
    _at_most("prompt_logprobs", request.prompt_logprobs or 0, http.max_logprobs)
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    _at_most(request.logprobs_field, request.num_logprobs or 0, http.max_logprobs)
    _at_most("logit_bias", len(request.logit_bias or ()), http.max_logit_bias, "entries")
    if request.has_stray_logprobs:
        field = request.logprobs_field
        raise RequestError(f"{field} needs logprobs=true", param=field)
    if request.priority and not http.allow_priority:
        raise UnsupportedParameter("priority", "is not taken from requests by this server")
    _check_stop(request, http)
    _check_bad_words(request, http)
    _check_lengths(request)
    _check_truncation(request)
    _check_stream_options(request)


def check_vocabulary(
    request: GenerationRequest, codec: Codec, eos_token_ids: frozenset[int]
) -> None:
    """Token ids against the vocabulary that all models share, and against one another."""
    codec.check_ids(request.stop_token_ids or [], "stop_token_ids")
    codec.check_ids(request.allowed_token_ids or [], "allowed_token_ids")
    codec.check_ids([token_id for token_id, _ in logit_bias(request)], "logit_bias")
    if request.allowed_token_ids == []:
        raise RequestError("allowed_token_ids must not be empty", param="allowed_token_ids")
    _check_possible(request, codec.vocab_size, eos_token_ids)


def _check_possible(
    request: GenerationRequest, vocab_size: int, eos_token_ids: frozenset[int]
) -> None:
    """Before min_tokens, tokens that end the text are banned: others must be left."""
    if not request.min_tokens:
        return
    ends = set() if request.ignore_eos else set(eos_token_ids)
    ends |= set(request.stop_token_ids or ())
    allowed = request.allowed_token_ids
    if ends.issuperset(range(vocab_size) if allowed is None else allowed):
        field = "stop_token_ids" if allowed is None else "allowed_token_ids"
        raise RequestError(
            f"{field}: every token that may be generated ends the text, "
            f"but min_tokens is {request.min_tokens}",
            param=field,
        )


def check_chars(num_chars: int, http: HttpConfig, param: str) -> None:
    """Before a text is rendered or tokenised: both take time by its length."""
    _at_most(param, num_chars, http.max_prompt_chars, "characters of text")


def check_tokens(num_tokens: int, http: HttpConfig, param: str) -> None:
    """Before token ids become text: as many as a text has characters."""
    _at_most(param, num_tokens, http.max_prompt_chars, "tokens")


def num_kept_tokens(request: GenerationRequest, max_length: int) -> int | None:
    """Tokens of a prompt's end that the request keeps; None for all of them."""
    wanted = request.truncate_prompt_tokens
    if wanted == -1:
        return max(1, max_length - max(1, request.max_new_tokens or 1))
    if wanted is not None:
        _at_most("truncate_prompt_tokens", wanted, max_length, "tokens")
    return wanted


def check_prompt(token_ids: list[int], max_length: int, param: str) -> None:
    """One token at least must be left to generate."""
    if not token_ids:
        raise RequestError(f"{param} must not be empty", param=param)
    if len(token_ids) >= max_length:
        raise ContextLengthExceeded(len(token_ids), max_length, param)


def check_prompt_scores(
    request: GenerationRequest, num_prompt_tokens: int, http: HttpConfig
) -> None:
    """Log-probabilities of prompts, which `num_prompt_tokens` of all prompts ask for."""
    field = request.logprobs_field if request.prompt_logprobs is None else "prompt_logprobs"
    count = num_prompt_tokens * request.num_prompt_scores
    unit = "scores (prompt tokens times choices times alternatives and one)"
    _at_most(field, count, http.max_prompt_scores, unit)


def logit_bias(request: GenerationRequest) -> list[tuple[int, float]]:
    """(token id, bias) pairs; JSON has no integer keys. Raises RequestError."""
    pairs = []
    for key, bias in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise RequestError(f"logit_bias: {key[:200]!r} is not a token id", param="logit_bias")
        pairs.append((int(key), bias))
    return pairs


def stop_strings(request: GenerationRequest) -> tuple[str, ...]:
    if request.stop is None:
        return ()
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)


def _check_stop(request: GenerationRequest, http: HttpConfig) -> None:
    stop = stop_strings(request)
    _at_most("stop", len(stop), http.max_stop, "strings")
    if "" in stop:
        raise RequestError("stop must not contain an empty string", param="stop")
    _at_most("stop", max(map(len, stop), default=0), http.max_stop_chars, "characters in a string")
    _at_most("stop_token_ids", len(request.stop_token_ids or ()), http.max_logit_bias, "ids")


def _check_bad_words(request: GenerationRequest, http: HttpConfig) -> None:
    words = request.bad_words or []
    _at_most("bad_words", len(words), http.max_bad_words, "texts")
    _at_most("bad_words", max(map(len, words), default=0), http.max_stop_chars, "characters in one")
    if not all(word.strip() for word in words):
        raise RequestError("bad_words must not contain an empty text", param="bad_words")


def _check_truncation(request: GenerationRequest) -> None:
    if request.truncate_prompt_tokens == 0:
        raise RequestError(
            "truncate_prompt_tokens must be -1 or at least 1", param="truncate_prompt_tokens"
        )


def _check_lengths(request: GenerationRequest) -> None:
    max_tokens, min_tokens = request.max_new_tokens, request.min_tokens or 0
    field = request.length_field
    if max_tokens == 0 and not request.may_generate_nothing:
        raise RequestError(f"{field} must be at least 1 unless echo is true", param=field)
    if max_tokens is not None and min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens {min_tokens} is above {field} {max_tokens}", param="min_tokens"
        )


def _check_stream_options(request: GenerationRequest) -> None:
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

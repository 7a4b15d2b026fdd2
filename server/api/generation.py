"""From a request to the sequences that decode it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from server.api.codec import Codec
from server.api.limits import (
    check_limits,
    check_prompt,
    check_vocabulary,
    logit_bias,
    stop_strings,
)
from server.api.protocol import CompletionRequest
from server.api.service import Service
from server.api.unsupported import check_supported
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.decoding.rng import derive_seed

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Generation:
    """One accepted request.

    Attributes:
        id: of the completion.
        created: unix time.
        num_prompt_tokens: of all prompts, each counted once.
        sequences: prompt-major: choice k of prompt i is sequences[i * n + k].
        decoding: the same for all of them.
    """

    id: str
    created: int
    num_prompt_tokens: int
    sequences: tuple[Sequence, ...]
    decoding: DecodingParams


async def make_generation(
    request: CompletionRequest, service: Service, completion_id: str
) -> Generation:
    """Check everything, tokenise, fan out.

    Raises:
        RequestError: the request cannot be served as it is.
        EngineDraining, EngineDead: no request can be served now.
    """
    service.check_ready()
    codec, max_length = service.codec, service.engine.max_length
    service.check_model(request.model)
    check_supported(request)
    check_limits(request, service.config)
    check_vocabulary(request, codec)
    decoding = service.decoding.resolve(request)
    prompts = await _prompt_ids(request, codec)
    for index, prompt in enumerate(prompts):
        check_prompt(prompt, max_length, "prompt" if len(prompts) == 1 else f"prompt.{index}")
    sequences = _fan_out(request, prompts, decoding, service, completion_id)
    num_prompt_tokens = sum(map(len, prompts))
    return Generation(
        completion_id, int(time.time()), num_prompt_tokens, tuple(sequences), decoding
    )


async def _prompt_ids(request: CompletionRequest, codec: Codec) -> list[list[int]]:
    """Token ids of each prompt. Texts are tokenised off the event loop."""
    prompt = request.prompt
    prompts = [prompt] if isinstance(prompt, str) or _is_token_list(prompt) else list(prompt)
    adds_special = request.add_special_tokens is not False

    def encode() -> list[list[int]]:
        return [codec.encode(text, adds_special) if text else [] for text in texts]

    texts = [each for each in prompts if isinstance(each, str)]
    if texts:
        return await run_in_threadpool(encode)
    ids = [each for each in prompts if isinstance(each, list)]
    for each in ids:
        codec.check_ids([i for i in each if isinstance(i, int)], "prompt")
    return ids


def _is_token_list(prompt: object) -> bool:
    return isinstance(prompt, list) and (not prompt or isinstance(prompt[0], int))


def _fan_out(
    request: CompletionRequest,
    prompts: list[list[int]],
    decoding: DecodingParams,
    service: Service,
    completion_id: str,
) -> Iterator[Sequence]:
    n, max_length, vocab_size = request.n or 1, service.engine.max_length, service.codec.vocab_size
    for i, prompt in enumerate(prompts):
        max_tokens = min(_max_tokens(request), max_length - len(prompt))
        for k in range(n):
            params = _sampling_params(request, max_tokens, k, vocab_size)
            yield Sequence.start(f"{completion_id}-{i * n + k}", prompt, params, decoding)


def _max_tokens(request: CompletionRequest) -> int:
    return DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens


def _sampling_params(
    request: CompletionRequest, max_tokens: int, choice: int, vocab_size: int
) -> SamplingParams:
    """Parameters of one choice; null takes the default of OpenAI, or of SamplingParams."""
    is_seeded = request.seed is not None
    seed = derive_seed(request.seed, choice) if request.seed is not None else secrets.randbits(63)
    allowed = request.allowed_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(request.min_tokens or 0, max_tokens),
        temperature=request.effective_temperature,
        top_k=min(max(0, request.top_k or 0), vocab_size),
        top_p=_default(request.top_p, 1.0),
        min_p=_default(request.min_p, 0.0),
        presence_penalty=_default(request.presence_penalty, 0.0),
        frequency_penalty=_default(request.frequency_penalty, 0.0),
        repetition_penalty=_default(request.repetition_penalty, 1.0),
        logit_bias=tuple(logit_bias(request)),
        allowed_token_ids=None if allowed is None else tuple(sorted(set(allowed))),
        seed=seed,
        is_seeded=is_seeded,
        stop=stop_strings(request),
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        include_stop=bool(request.include_stop_str_in_output),
        ignore_eos=bool(request.ignore_eos),
        skip_special_tokens=request.skip_special_tokens is not False,
        logprobs=request.logprobs,
    )


def _default(value: float | None, default: float) -> float:
    return default if value is None else float(value)

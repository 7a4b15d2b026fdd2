"""From a request to the sequences that decode it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

from starlette.concurrency import run_in_threadpool

from server.api.codec import Codec
from server.api.limits import (
    check_limits,
    check_prompt,
    check_prompt_scores,
    check_vocabulary,
    logit_bias,
    num_kept_tokens,
    stop_strings,
)
from server.api.protocol import GenerationRequest
from server.api.service import Service
from server.api.structure import Structure, find_structure, make_matchers
from server.api.unsupported import check_supported
from server.core.matcher import Matcher
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.decoding.rng import derive_seed

# Token ids of each prompt, and the field to blame for a prompt. Texts are tokenised off the loop.
ReadPrompts = Callable[[], Awaitable[list["Prompt"]]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, the field of the request they came from, and its text where that is all."""

    token_ids: list[int]
    field: str
    text: str | None = None

    def truncated(self, num_kept: int | None) -> Prompt:
        """The last `num_kept` tokens."""
        if num_kept is None or len(self.token_ids) <= num_kept:
            return self
        return Prompt(self.token_ids[-num_kept:], self.field)


@dataclass(frozen=True, slots=True)
class Generation:
    """One accepted request.

    Attributes:
        id: of the reply.
        created: unix time.
        num_choices: of each prompt, n.
        prompts: in the request's order.
        sequences: prompt-major: choice k of prompt i is sequences[i * n + k].
        decoding: the same for all of them.
    """

    id: str
    created: int
    num_choices: int
    prompts: tuple[Prompt, ...]
    sequences: tuple[Sequence, ...]
    decoding: DecodingParams

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def prompt(self, index: int) -> Prompt:
        """Of one choice."""
        return self.prompts[index // self.num_choices]


async def make_generation(
    request: GenerationRequest,
    service: Service,
    id_prefix: str,
    read_prompts: ReadPrompts,
    structure: Structure | None = None,
) -> Generation:
    """Check everything, tokenise, fan out.

    Args:
        request: the body.
        service: must be ready.
        id_prefix: of the reply's id.
        read_prompts: called once everything else has passed.
        structure: of the texts; the request's own if None.

    Raises:
        RequestError: the request cannot be served as it is.
        EngineOverloaded, EngineDraining, EngineDead: no request can be served now.
    """
    service.check_ready()
    service.check_model(request.model)
    check_supported(request)
    check_limits(request, service.config)
    # Before texts are tokenised and forms are read, which a full queue would throw away.
    service.check_room(request.num_prompts * (request.n or 1))
    check_vocabulary(request, service.codec, service.engine.eos_token_ids)
    decoding = service.decoding.resolve(request)
    num_kept = num_kept_tokens(request, service.engine.max_length)
    prompts = [prompt.truncated(num_kept) for prompt in await read_prompts()]
    bad_words = await _bad_words(request, service.codec)
    for prompt in prompts:
        check_prompt(prompt.token_ids, service.engine.max_length, prompt.field)
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    check_prompt_scores(request, num_tokens, service.config.http)
    structure = structure or find_structure(request)
    matchers = await make_matchers(structure, service, len(prompts) * (request.n or 1))
    unique = secrets.token_hex(12)
    sequences = _fan_out(request, prompts, bad_words, decoding, service, unique)
    return Generation(
        # Sequences keep an id of their own: two clients may send the same one.
        id=f"{id_prefix}-{request.request_id or unique}",
        created=int(time.time()),
        num_choices=request.n or 1,
        prompts=tuple(prompts),
        sequences=tuple(map(_with_matcher, sequences, matchers)),
        decoding=decoding,
    )


def _fan_out(
    request: GenerationRequest,
    prompts: list[Prompt],
    bad_words: tuple[tuple[int, ...], ...],
    decoding: DecodingParams,
    service: Service,
    unique: str,
) -> Iterator[Sequence]:
    n, max_length = request.n or 1, service.engine.max_length
    shared = _sampling_params(request, bad_words, service.codec.vocab_size)
    for i, prompt in enumerate(prompts):
        left = max_length - len(prompt.token_ids)
        wanted = request.max_new_tokens
        max_tokens = left if wanted is None else min(wanted, left)
        for k in range(n):
            params = replace(
                shared,
                max_tokens=max_tokens,
                min_tokens=min(request.min_tokens or 0, max_tokens),
                seed=_seed(request, k),
            )
            if k > 0 and params.prompt_logprobs is not None:
                # The first choice's are those of all. What generates nothing waits for its own.
                params = replace(params, prompt_logprobs=0 if max_tokens == 0 else None)
            yield Sequence.start(
                f"{unique}-{i * n + k}",
                prompt.token_ids,
                params,
                decoding,
                priority=request.priority or 0,
            )


def _with_matcher(sequence: Sequence, matcher: Matcher | None) -> Sequence:
    sequence.matcher = matcher
    return sequence


def _seed(request: GenerationRequest, choice: int) -> int:
    return secrets.randbits(63) if request.seed is None else derive_seed(request.seed, choice)


def _sampling_params(
    request: GenerationRequest, bad_words: tuple[tuple[int, ...], ...], vocab_size: int
) -> SamplingParams:
    """What all choices have in common; null takes the default of OpenAI, or of SamplingParams."""
    allowed = request.allowed_token_ids
    return SamplingParams(
        temperature=request.effective_temperature,
        top_k=min(max(0, request.top_k or 0), vocab_size),
        top_p=_default(request.top_p, 1.0),
        min_p=_default(request.min_p, 0.0),
        presence_penalty=_default(request.presence_penalty, 0.0),
        frequency_penalty=_default(request.frequency_penalty, 0.0),
        repetition_penalty=_default(request.repetition_penalty, 1.0),
        logit_bias=tuple(logit_bias(request)),
        allowed_token_ids=None if allowed is None else tuple(sorted(set(allowed))),
        bad_words=bad_words,
        is_seeded=request.seed is not None,
        stop=stop_strings(request),
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        include_stop=bool(request.include_stop_str_in_output),
        ignore_eos=bool(request.ignore_eos),
        skip_special_tokens=request.skip_special_tokens is not False,
        cache_salt=request.cache_salt or "",
        logprobs=request.num_logprobs,
        prompt_logprobs=request.num_prompt_logprobs,
        provenance=bool(request.cos and request.cos.provenance),
    )


async def _bad_words(request: GenerationRequest, codec: Codec) -> tuple[tuple[int, ...], ...]:
    words = request.bad_words
    if not words:
        return ()
    return await run_in_threadpool(
        lambda: tuple(form for word in words for form in codec.forms(word, "bad_words"))
    )


def _default(value: float | None, default: float) -> float:
    return default if value is None else float(value)

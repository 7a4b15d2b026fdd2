"""The engine in this process: cycles of the random pair, and texts of a real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Row
from pathlib import Path
from typing import Any, get_args

from server.bench.prompts import load_prompts
from server.config import StrategyName
from server.config_file import load_config
from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams, proposal_lengths
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.engine.detokenizer import Decoder
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.runner.base import ModelRunner
from server.runner.loader import LoadedModels, load_models

_MU = 0.1
_STEP_TOKENS = 2048


class Numbers:
    """Text of models that have no tokenizer."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(f"{i} " for i in ids)


def time_engine_cycles(
    members: tuple[ModelRunner, ModelRunner],
    batches: Row[int],
    context: int,
    gamma: int,
    num_tokens: int,
) -> list[dict[str, Any]]:
    """Seconds of one whole cycle of the engine: forwards, choosing, verifying, bookkeeping.

    Greedy, of two unrelated random models: they hardly ever agree, so nearly every cycle is gamma
    proposals, one scoring and one token, for all sequences at once. How many tokens a cycle of
    models that do agree yields is not measured here.

    Args:
        members: proposer and expert.
        batches: numbers of sequences.
        context: tokens of each prompt.
        gamma: tokens proposed.
        num_tokens: made for each sequence.
    """
    rows = []
    for size in batches:
        row: dict[str, Any] = {"batch": size, "gamma": gamma}
        for strategy in ("standard", "cos"):
            prompts = make_prompts(size, context, members[0].vocab_size)
            decoding = make_decoding(strategy, gamma)
            # The first decoding step belongs to the prompt's last token; hence one token more.
            result = _decode(members, Numbers(), prompts, decoding, 0.0, num_tokens + 1, True)
            row[strategy] = result
        rows.append(row)
    return rows


def time_pair(
    config: Path,
    batches: Row[int],
    num_tokens: int,
    temperatures: Row[float],
    may_go_on: Callable[[], bool],
    report: Callable[[str], None],
    overrides: Row[str] = (),
) -> list[dict[str, Any]]:
    """Tokens a second of a configured pair, contrastive, by strategy.

    Args:
        config: a configs/*.yaml of two models.
        batches: numbers of sequences.
        num_tokens: made for each sequence.
        temperatures: to go through.
        may_go_on: asked before each cell; False leaves the rest out.
        report: takes one line for each phase.
        overrides: of the configuration.
    """
    loaded = load_models(load_config(config, overrides), report)
    prompts = [
        loaded.tokenizer.backend_tokenizer.encode(text).ids
        for text in load_prompts("humaneval").prompts
    ]
    rows = []
    for temperature in temperatures:
        for size in batches:
            if not may_go_on():
                report(f"left out for want of time: temperature {temperature}, batch {size}")
                continue
            chosen = [prompts[i % len(prompts)] for i in range(size)]
            rows.append(_pair_row(loaded, chosen, temperature, num_tokens))
    return rows


def _pair_row(
    loaded: LoadedModels, prompts: list[list[int]], temperature: float, num_tokens: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"batch": len(prompts), "temperature": temperature}
    for strategy in [s for s in ("standard", "cos", "auto") if s in get_args(StrategyName)]:
        row[strategy] = _decode(
            loaded.runners,
            loaded.tokenizer.backend_tokenizer,
            prompts,
            make_decoding(strategy, 4),
            temperature,
            num_tokens,
        )
    return row


def make_prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Of models that have no tokenizer."""
    return [[(7919 * i + 31 * j + 1) % vocab_size for j in range(length)] for i in range(count)]


def make_decoding(strategy: str, gamma: int) -> DecodingParams:
    """Of two models, contrasted; the first proposes `gamma` tokens."""
    lengths = proposal_lengths(gamma, 2)
    combination = Combination.contrastive(2, _MU)
    return DecodingParams(strategy, combination, lengths, 0, False)  # type: ignore[arg-type]


def _decode(
    runners: Row[ModelRunner],
    decoder: Decoder,
    prompts: list[list[int]],
    decoding: DecodingParams,
    temperature: float,
    num_tokens: int,
    is_read: bool = False,
) -> dict[str, Any]:
    """Decode all prompts together; figures of the steps after the last that read any of them.

    With `is_read` prompts count as read but for their last token, so that all begin at once: what
    their pages hold costs a forward the same.
    """
    steps: list[StepStats] = []
    limits = EngineLimits(max_sequences=len(prompts), max_step_tokens=_STEP_TOKENS)
    engine = Engine(runners, decoder, frozenset(), limits, on_step=steps.append)
    add_texts(engine, prompts, decoding, temperature, num_tokens, is_read)
    while engine.has_work:
        engine.step()
    last = max(i for i, step in enumerate(steps) if step.num_prefill_tokens)
    return _summary(steps[last + 1 :], len(runners) - 1)


def add_texts(
    engine: Engine,
    prompts: Row[list[int]],
    decoding: DecodingParams,
    temperature: float,
    num_tokens: int,
    is_read: bool,
) -> None:
    """Let `engine` write `num_tokens` for each prompt; for `is_read` see `_decode`."""
    for i, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=num_tokens,
            temperature=temperature,
            seed=i,
            ignore_eos=True,
            prefix_cache=not is_read,  # nobody may find pages that were never written
        )
        sequence = Sequence.start(str(i), prompt, params, decoding)
        if is_read:
            sequence.num_seen = [len(prompt) - 1] * engine.num_models
        engine.add(sequence)


def _summary(steps: list[StepStats], expert: int) -> dict[str, Any]:
    seconds = sum(step.step_seconds for step in steps)
    tokens = sum(delivery.num_tokens for step in steps for delivery in step.deliveries)
    scored = [step.num_sequences for step in steps if step.model == expert]
    num_cycles = len(scored)
    verdicts = [accepted for step in steps for _, _, accepted in step.verified_by_offset]
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "cycles": num_cycles,
        "sequences": sum(scored) / num_cycles if num_cycles else 0.0,
        "cycle_seconds": seconds / num_cycles if num_cycles else 0.0,
        "accepted": sum(verdicts) / len(verdicts) if verdicts else None,
    }

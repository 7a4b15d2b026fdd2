"""What one request asks of sampling and of decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from server.config import StrategyName, VerificationName
from server.core.combination import Combination

_FIRST_GAMMA = 2


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Warps and ends of one sequence; validated at the edge, trusted here.

    Attributes:
        max_tokens: verified tokens to generate at most; 0 only with prompt_logprobs.
        min_tokens: no stop token ends the text before so many tokens, and stop strings are looked
            for only in the text after them.
        temperature: 0 is greedy.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this mass; 1 keeps all.
        min_p: drop tokens below this fraction of the top probability; 0 keeps all.
        presence_penalty, frequency_penalty: OpenAI's, over generated tokens.
        repetition_penalty: Keskar et al. 2019, over prompt and generated tokens; 1 is none.
        logit_bias: (token id, bias) pairs.
        allowed_token_ids: only these may be generated; None allows all.
        bad_words: token sequences that are never completed; see `decoding.warp`.
        seed: of the counter-based randomness; the caller draws one where the client gave none.
        is_seeded: the client gave it, so the text must be a function of it and of the target alone.
        stop: strings that end the text.
        stop_token_ids: tokens that end the text, besides the models' own end-of-text tokens.
        include_stop: leave the stop string in the text.
        ignore_eos: the models' own end-of-text tokens do not end the text.
        skip_special_tokens: leave special tokens out of the text.
        prefix_cache: keys and values of the prompt may be found instead of computed, and are left
            for others. Never with prompt_logprobs.
        cache_salt: only sequences with the same salt find each other's.
        logprobs: alternatives to report for each token; 0 reports only the token, None nothing.
        prompt_logprobs: the same for the tokens of the prompt.
        provenance: report where each token came from.

    What follows from these, and is asked of each token:

        is_greedy: the most probable token is taken.
        is_coupled: proposals and targets share their randomness; see `decoding.verify`.
        is_truncated: improbable tokens are left out.
        has_penalties: scores depend on the tokens before.
        adjusts_scores: scores of single tokens are changed.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    is_seeded: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prefix_cache: bool = True
    cache_salt: str = ""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    provenance: bool = False
    is_greedy: bool = field(init=False, repr=False, compare=False)
    is_coupled: bool = field(init=False, repr=False, compare=False)
    is_truncated: bool = field(init=False, repr=False, compare=False)
    has_penalties: bool = field(init=False, repr=False, compare=False)
    adjusts_scores: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        is_greedy = self.temperature == 0
        truncates = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        has_penalties = (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )
        adjusts_scores = (
            has_penalties
            or bool(self.logit_bias)
            or self.allowed_token_ids is not None
            or bool(self.bad_words)
            or self.min_tokens > 0
        )
        for name, value in (
            ("is_greedy", is_greedy),
            ("is_coupled", self.is_seeded or is_greedy),
            ("is_truncated", truncates and not is_greedy),
            ("has_penalties", has_penalties),
            ("adjusts_scores", adjusts_scores),
        ):
            object.__setattr__(self, name, value)  # it is frozen from here on


def proposal_lengths(
    gamma: int | tuple[int, ...] | Literal["auto"], num_models: int
) -> tuple[int, ...]:
    """[num_models]; a single number is the first model's, the others propose their bonus alone.

    "auto" stands for the lengths from which a choice departs.
    """
    if gamma == "auto":
        gamma = _FIRST_GAMMA
    return gamma if isinstance(gamma, tuple) else (gamma, *[1] * (num_models - 1))


@dataclass(frozen=True, slots=True)
class LookupParams:
    """How prompt lookup guesses; see `core.lookup`.

    Attributes:
        max_ngram, min_ngram: how many of the last tokens are looked for, and must be found.
        max_tokens: that are proposed at once, at most the engine's max_gamma.
    """

    max_ngram: int
    min_ngram: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class DecodingParams:
    """How one sequence is decoded; hashable, so that equal ones share tensors and strategies.

    Attributes:
        strategy: which model advances next.
        combination: the target of verification.
        gamma: proposal length of each model, each at most the engine's max_gamma; 0: it never
            proposes.
        kappa: mixture only: foreign-coin tokens the first model may draft through.
        shared_coins: mixture: take the batch's coins, not the sequence's own; auto: a mixture with
            shared coins may be chosen.
        is_gamma_auto: `gamma` is only where choosing begins.
        verification: of proposals that are not coupled; a mixture's are decided by token.
        lookup: None where nothing is proposed but by models; always of a mixture.
    """

    strategy: StrategyName
    combination: Combination
    gamma: tuple[int, ...]
    kappa: int = 0
    shared_coins: bool = False
    is_gamma_auto: bool = False
    verification: VerificationName = "token"
    lookup: LookupParams | None = None

    @property
    def is_auto(self) -> bool:
        """Something of it is left to be chosen while it runs."""
        return self.strategy == "auto" or self.is_gamma_auto

    @property
    def is_plain(self) -> bool:
        """Nothing is proposed: all scorers score each token, and it is drawn."""
        return self.strategy in ("standard", "single") and self.lookup is None

    @property
    def verifies_blocks(self) -> bool:
        # A mixture's windows end by coins, and its first model's own positions are never rejected.
        return self.verification == "block" and self.strategy != "mixture"

"""One token list being decoded, and its counters.

    token_ids   | prompt | verified ... | pending ... |
                         num_prompt     num_verified  len(token_ids)
    num_seen[k]    tokens that model k has consumed

Model k has scored every position up to and including num_seen[k]: the score of a position is the
distribution of its token given all tokens before it. A sequence holds no tensors; scores and KV
are found by its `slot` and its page tables, and rolling back means moving counters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from operator import lt

import numpy as np

from server.core.lookup import LOOKUP, PromptLookup
from server.core.matcher import Matcher
from server.core.proposal import Proposal
from server.core.provenance import Provenance, TokenOutcome
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.token_counts import Ids, TokenCounts
from server.core.token_mask import Bits, both, packed
from server.core.unread import is_unread


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True)
class SequenceStats:
    """What decoding one sequence took; counts of tokens unless said otherwise."""

    proposed: list[int]  # [num_models] by proposer
    accepted: list[int]  # [num_models] by proposer
    verified: list[int] = field(default_factory=list)  # [num_models] accepted or rejected
    strategies: dict[str, int] = field(default_factory=dict)  # delivered tokens by strategy
    num_recovered: int = 0
    num_drawn: int = 0
    num_forced: int = 0  # by a grammar that left no choice
    num_bonus: int = 0
    num_looked_up: int = 0  # proposed by prompt lookup
    num_lookup_accepted: int = 0
    num_discarded: int = 0  # verified, then cut off by the end of the text
    num_preemptions: int = 0
    num_cycles: int = 0  # steps that verified any of its tokens
    decode_seconds: float = 0.0  # its share of the steps that decoded it
    baseline_seconds: float | None = None  # what standard decoding takes; None if that is unknown
    forwards: list[int] = field(default_factory=list)  # [num_models] forwards that decoded
    first_run: float | None = None  # reading of the engine's clock when a model first ran over it
    cached: list[int] = field(default_factory=list)  # [num_models] found, not computed, at first


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """State of one sequence. Compared by identity.

    Attributes:
        id: unique among live sequences.
        token_ids: prompt, verified and pending tokens; of the pending ones some may be unread.
        num_prompt, num_verified: where the zones end.
        num_seen: [num_models]; what each model has consumed.
        tail: one entry for each pending token. Those of LOOKUP have it to themselves.
        resume_at: [num_models]; model k feeds up to here before the sequence takes part in
            decoding: the prompt for models that must score its end, or what k had seen when
            the sequence was preempted.
        schedule: how it is decoded at present: `decoding`, or what was chosen where that is open.
        is_shadowed: it decodes by standard for a measurement's sake; see `engine.shadow`.
        slot: ring of the ScoreStore while running, else -1.
        num_scored: tokens of the prompt whose log-probabilities are known, the first one
            included; num_prompt where none were asked for. See `open_window`.
        prompt_slot: ring that holds scores of the prompt's positions meanwhile, else -1.
        coin_base: mixture with shared coins: index of the batch's coin stream minus position.
        declined_at: length at which a model had nothing to propose that the request allows, or
            nothing to choose; the token there is drawn, or forced. -1: nowhere.
        num_rejections: so far; draws after a rejection use randomness of their own.
        matcher: of the grammar that the text must follow.
        lookup: guesses tokens, where `decoding` has it.
        provenance: of verified tokens that nobody has taken yet; None where it is not asked for.
        priority: waiting sequences are admitted in ascending order of it, then as they came.
        token_counts: see `counts_before`.
        listed: mask of `params.allowed_token_ids`, once it has been asked for; see `mask`.
    """

    id: str
    token_ids: list[int]
    params: SamplingParams
    decoding: DecodingParams
    schedule: DecodingParams
    num_prompt: int = 0
    num_verified: int = 0
    num_seen: list[int] = field(default_factory=list)
    tail: list[Proposal] = field(default_factory=list)
    resume_at: list[int] = field(default_factory=list)
    is_shadowed: bool = False
    slot: int = -1
    num_scored: int = 0
    prompt_slot: int = -1
    coin_base: int | None = None
    declined_at: int = -1
    num_rejections: int = 0
    matcher: Matcher | None = None
    lookup: PromptLookup | None = None
    provenance: list[Provenance] | None = None
    priority: int = 0
    token_counts: TokenCounts = field(default_factory=TokenCounts)
    listed: Bits | None = None
    status: Status = Status.WAITING
    stats: SequenceStats = field(default_factory=lambda: SequenceStats([], []))

    @classmethod
    def start(
        cls,
        id: str,
        prompt: list[int],
        params: SamplingParams,
        decoding: DecodingParams,
        priority: int = 0,
        matcher: Matcher | None = None,
    ) -> Sequence:
        """A waiting sequence that nobody has seen yet. `prompt` has at least one token."""
        num_models = len(decoding.combination.weights)
        return cls(
            id=id,
            token_ids=list(prompt),
            params=params,
            decoding=decoding,
            schedule=decoding,
            num_prompt=len(prompt),
            num_verified=len(prompt),
            num_scored=len(prompt) if params.prompt_logprobs is None else 1,
            num_seen=[0] * num_models,
            resume_at=[0] * num_models,
            matcher=matcher,
            lookup=None if decoding.lookup is None else PromptLookup(decoding.lookup),
            provenance=[] if params.provenance else None,
            priority=priority,
            stats=SequenceStats(
                proposed=[0] * num_models,
                accepted=[0] * num_models,
                verified=[0] * num_models,
                forwards=[0] * num_models,
                cached=[0] * num_models,
            ),
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_models(self) -> int:
        return len(self.num_seen)

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_verified

    @property
    def num_generated(self) -> int:
        return self.num_verified - self.num_prompt

    @property
    def limit(self) -> int:
        """Length the sequence can never exceed."""
        return self.num_prompt + self.params.max_tokens

    @property
    def is_full(self) -> bool:
        """No token may be appended, pending or not."""
        return len(self.token_ids) >= self.num_prompt + self.params.max_tokens

    @property
    def is_closed(self) -> bool:
        """No model may propose next: it is full, a proposer has declined, or it was looked up.

        What follows tokens that were looked up is drawn.
        """
        if len(self.token_ids) == self.declined_at or self.is_full:
            return True
        return bool(self.tail) and self.tail[0].proposer == LOOKUP

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def is_resuming(self) -> bool:
        """Some model must still consume the prompt, or what it lost to a preemption."""
        return any(map(lt, self.num_seen, self.resume_at))

    @property
    def scores_prompt(self) -> bool:
        """Log-probabilities of the prompt were asked for, and some are still missing."""
        return self.num_scored < self.num_prompt

    @property
    def first_open(self) -> int:
        """First position whose scores are still needed."""
        return self.num_verified if self.num_scored >= self.num_prompt else self.num_scored

    def open_window(self, size: int) -> None:
        """Let every scorer feed the prompt up to where it has scored `size` open positions.

        Scorers go through the prompt window by window, since a position's log-probabilities need
        the scores of all of them at once, and these are too large to keep for a whole prompt.
        After the last one the whole prompt is open, so that decoding begins at its end.
        """
        until = self.num_prompt
        if self.scores_prompt:
            until = min(until, self.num_scored - 1 + size)
        for model in self.decoding.combination.scorers:
            self.resume_at[model] = until

    def num_unseen(self, model: int) -> int:
        """Tokens that `model` would feed in an unbounded advance."""
        until = self.resume_at[model] if self.num_seen[model] < self.resume_at[model] else len(self)
        return until - self.num_seen[model]

    def counts_before(self, position: int) -> tuple[Ids, Ids]:
        """Tokens before `position`, and how often each was generated; see `TokenCounts.before`.

        None of them may be unread.
        """
        return self.token_counts.before(
            self.token_ids, self.num_prompt, self.num_verified, position
        )

    def mask(self, position: int) -> Bits | None:
        """Tokens that a list and a grammar allow at `position`; None: all of them.

        None before it may be unread.
        """
        if self.listed is None and self.params.allowed_token_ids is not None:
            # The list may be as long as the vocabulary: it is read once, not at each position.
            self.listed = packed(self.params.allowed_token_ids)
        if self.matcher is None:
            return self.listed
        generated = self.token_ids[self.num_prompt : position]
        followed = np.frombuffer(self.matcher.mask(generated), np.uint8)
        return followed if self.listed is None else both(followed, self.listed)

    def propose(self, token_id: int, proposal: Proposal) -> None:
        """Append a pending token that a model has proposed."""
        self.token_ids.append(token_id)
        self.tail.append(proposal)
        self.stats.proposed[proposal.proposer] += 1
        self.stats.num_bonus += proposal.is_bonus

    def look_up(self, token_ids: list[int]) -> None:
        """Append pending tokens that no model has proposed; nothing may be pending."""
        assert self.num_pending == 0
        self.token_ids += token_ids
        self.tail += [Proposal(LOOKUP)] * len(token_ids)
        self.stats.num_looked_up += len(token_ids)

    def decline(self) -> None:
        """Nobody proposes the next token."""
        self.declined_at = len(self.token_ids)

    @property
    def has_unread(self) -> bool:
        """Some pending token's id is not known to the host."""
        return any(is_unread(token_id) for token_id in self.token_ids[self.num_verified :])

    def read(self, token_ids: list[int]) -> None:
        """Fill in the ids of all pending tokens.

        A negative one is none: there its proposer had nothing to propose, and what was proposed
        behind it never was.
        """
        assert len(token_ids) == self.num_pending
        self.token_ids[self.num_verified :] = token_ids
        declined = next((i for i, token_id in enumerate(token_ids) if token_id < 0), None)
        if declined is not None:
            self._take_back(declined)
            self.decline()

    def accept(self, count: int) -> None:
        """Move the first `count` pending tokens to the verified zone."""
        assert 0 <= count <= self.num_pending
        for proposal in self.tail[:count]:
            if proposal.proposer == LOOKUP:
                self.stats.num_lookup_accepted += 1
            else:
                self.stats.accepted[proposal.proposer] += 1
            if self.provenance is not None:
                outcome: TokenOutcome = "bonus" if proposal.is_bonus else "accepted"
                self.provenance.append(Provenance(proposal.proposer, outcome))
        del self.tail[:count]
        self.num_verified += count

    def recover(self, token_id: int) -> None:
        """Replace the first pending token by a verified one and drop the rest of the tail."""
        position = self.num_verified
        assert self.num_pending > 0
        if self.provenance is not None:
            self.provenance.append(Provenance(self.tail[0].proposer, "recovered"))
        del self.token_ids[position:]
        self.tail.clear()
        self.declined_at = -1
        self.num_rejections += 1
        self.num_seen = [min(seen, position) for seen in self.num_seen]
        self.resume_at = [min(until, position) for until in self.resume_at]
        self.token_ids.append(token_id)
        self.num_verified += 1
        self.stats.num_recovered += 1

    def draw(self, token_id: int) -> None:
        """Append a verified token; nothing may be pending."""
        assert self.num_pending == 0
        if self.provenance is not None:
            self.provenance.append(Provenance(None, "drawn"))
        self.token_ids.append(token_id)
        self.num_verified += 1
        self.stats.num_drawn += 1

    def force(self, token_id: int) -> None:
        """Append a verified token that is the only possible one; nothing may be pending."""
        assert self.num_pending == 0
        if self.provenance is not None:
            self.provenance.append(Provenance(None, "forced"))
        self.token_ids.append(token_id)
        self.num_verified += 1
        self.stats.num_forced += 1

    def take_provenance(self) -> list[Provenance]:
        """Of the tokens verified since it was last taken; empty where it is not asked for."""
        taken = self.provenance or []
        if taken:
            self.provenance = []
        return taken

    def finish(self, num_verified: int) -> None:
        """End the text after `num_verified` tokens; whatever follows is dropped."""
        self.stats.num_discarded += self.num_verified - num_verified
        del self.token_ids[num_verified:]
        self.tail.clear()
        self.num_verified = num_verified
        self.status = Status.FINISHED

    def forget(self) -> None:
        """Preemption by recompute: every model starts over, and resumes where it was."""
        assert not self.has_unread, "nobody keeps what it stands for"
        self.resume_at = [
            max(seen, until) for seen, until in zip(self.num_seen, self.resume_at, strict=True)
        ]
        self.num_seen = [0] * self.num_models
        self.status = Status.WAITING
        self.stats.num_preemptions += 1

    def _take_back(self, count: int) -> None:
        """All pending tokens but the first `count`, as if they had never been proposed."""
        for proposal in self.tail[count:]:
            self.stats.proposed[proposal.proposer] -= 1
            self.stats.num_bonus -= proposal.is_bonus
        length = self.num_verified + count
        del self.token_ids[length:], self.tail[count:]
        self.num_seen = [min(seen, length) for seen in self.num_seen]
        self.resume_at = [min(until, length) for until in self.resume_at]

    def check(self) -> None:
        """Raise AssertionError where the counters contradict each other."""
        assert 0 < self.num_prompt <= self.num_verified <= len(self.token_ids) <= self.limit
        assert 0 < self.num_scored <= self.num_prompt
        assert len(self.tail) == self.num_pending
        assert all(0 <= seen <= len(self.token_ids) for seen in self.num_seen)
        assert all(0 <= until <= len(self.token_ids) for until in self.resume_at)

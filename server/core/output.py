"""What leaves the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from server.core.provenance import Provenance
from server.core.sequence import SequenceStats

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log of the combined distribution before temperature and truncation, at one position.

    Attributes:
        token_id: the token that stands there.
        logprob: its log-probability; may be -inf.
        top: the most probable (token id, logprob) pairs, best first; as many as were asked for.
        rank: the token's place among all, 1 for the most probable; 0 where it was not computed.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one step added to one sequence.

    Attributes:
        sequence_id: whose it is.
        token_ids: newly verified tokens, cut at the end of the text.
        text: newly decided text; characters that may yet turn out to belong to a stop string or
            to an unfinished UTF-8 character are held back for a later delta.
        logprobs: one for each token, or empty where none were asked for.
        prompt_logprobs: of the prompt from its second token on, all of them on the first delta;
            empty where none were asked for.
        provenance: one for each token, or empty where it was not asked for.
        finish_reason: set on the last delta of a sequence.
        stop_reason: the stop string or stop token id that ended the text, None for the models'
            own end-of-text token and for every other end.
        stats: set on the last delta.
        num_cached: prompt tokens whose keys and values were found in the prefix cache.
        error: why the sequence failed, where finish_reason is "error".
    """

    sequence_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    provenance: tuple[Provenance, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    stats: SequenceStats | None = None
    num_cached: int = 0
    error: str | None = field(default=None)

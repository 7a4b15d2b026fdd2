"""Measures standard decoding on the live load: now and then, for some rounds, all decode by it.

While such a window is open, each sequence goes over to standard decoding where none of its tokens
is pending (`Strategies.settle`). Steps count once all have, so what is counted is what a server
under `strategy: standard` does. Outside windows, tokens are charged what one took when as many
sequences last decoded by standard: a measured baseline, where `CostTable` has an estimated one.

Windows open and close by seconds, steps and the number of tokens drawn. As with the controller's
choices, seconds depend a little on tokens that were proposed and dropped, and on no randomness that
is used again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Row
from dataclasses import dataclass, field

from server.core.sequence import Sequence
from server.core.stats import ShadowStats, StepStats
from server.decoding.strategies import Strategies, may_shadow

_PATIENCE = 4  # a window of so many times its steps is given up
_SLACK = 32  # steps more, for what is pending when it opens
_KEPT = 0.5  # weight of earlier windows beside the last

Key = tuple[tuple[int, ...], int]  # scorers, and how many sequences decode


@dataclass(slots=True)
class _Window:
    """One that is open.

    Attributes:
        rounds: measured so far.
        is_aligned: the last step ended a round for all, or was counted.
        key: what the seconds of the round at hand belong to.
        seconds: of the round at hand.
        measured: [seconds, tokens] by key.
    """

    num_steps: int = 0
    rounds: float = 0.0
    is_aligned: bool = False
    key: Key | None = None
    seconds: float = 0.0
    measured: dict[Key, tuple[float, int]] = field(default_factory=dict)


class Shadow:
    """Opens windows, counts in them, and charges the tokens between them; on the engine thread."""

    def __init__(self, strategies: Strategies, every_seconds: float, rounds: int) -> None:
        """A window of `rounds` tokens of each sequence after `every_seconds` of decoding."""
        self._strategies = strategies
        self._every_seconds = every_seconds
        self._rounds = rounds
        self._seconds = 0.0
        self._window: _Window | None = None
        self._is_even = False  # no round was begun when it last looked
        self._known: dict[Key, tuple[float, float]] = {}

    def look(self, running: Iterable[Sequence]) -> None:
        """At sequences as a step has left them, of which it is told when more may be launched."""
        if self._window is not None:
            self._is_even = all(_is_plain(each) for each in running if not each.is_resuming)

    def observe(self, stats: StepStats, running: Iterable[Sequence], batch: int) -> None:
        """Count one step that `batch` sequences were decoding in, and after which some run."""
        decoding = [sequence for sequence in running if not sequence.is_resuming]
        key = _key(stats, decoding, batch)
        stats.shadow = ShadowStats()
        if self._window is not None:
            self._measure(self._window, stats, stats.shadow, key)
            self._close(self._window, stats.shadow)
            return
        if key in self._known:
            seconds, tokens = self._known[key]
            stats.shadow.baseline_seconds = _num_decoded(stats) * seconds / tokens
            stats.shadow.decode_seconds = stats.decode_seconds
        self._seconds += stats.decode_seconds
        is_due = self._seconds >= self._every_seconds
        if is_due and decoding and all(may_shadow(sequence.decoding) for sequence in decoding):
            self._window, self._is_even = _Window(), False
            self._strategies.is_shadowing = True

    def _measure(
        self,
        window: _Window,
        stats: StepStats,
        shadow: ShadowStats,
        key: Key | None,
    ) -> None:
        window.num_steps += 1
        num_tokens = _num_decoded(stats)
        is_whole = window.seconds == 0 or key == window.key
        if window.is_aligned and is_whole and key is not None and _is_plain_step(stats):
            window.key = key
            window.seconds += stats.step_seconds
            if num_tokens:
                seconds, tokens = window.measured.get(key, (0.0, 0))
                window.measured[key] = seconds + window.seconds, tokens + num_tokens
                window.rounds += num_tokens / key[1]
                shadow.standard_seconds = window.seconds
                shadow.standard_tokens = num_tokens
                window.seconds = 0.0
            return
        # Counting begins where a round has ended: what is begun would count by half.
        window.seconds = 0.0
        window.is_aligned = num_tokens > 0 and self._is_even

    def _close(self, window: _Window, shadow: ShadowStats) -> None:
        num_models = max((len(scorers) for scorers, _ in window.measured), default=1)
        limit = _PATIENCE * self._rounds * num_models + _SLACK
        if window.rounds < self._rounds and window.num_steps < limit:
            return
        for key, (seconds, tokens) in window.measured.items():
            before = self._known.get(key, (0.0, 0.0))
            self._known[key] = _KEPT * before[0] + seconds, _KEPT * before[1] + tokens
        shadow.outcome = "measured" if window.measured else "abandoned"
        self._window = None
        self._strategies.is_shadowing = False
        self._seconds = 0.0


def _key(stats: StepStats, decoding: Row[Sequence], batch: int) -> Key | None:
    """None where combinations of several sets of models decode together, or nothing does."""
    scorers = {sequence.decoding.combination.scorers for sequence in decoding}
    scorers |= {delivery.decoding.combination.scorers for delivery in stats.deliveries}
    return (scorers.pop(), batch) if len(scorers) == 1 and batch else None


def _num_decoded(stats: StepStats) -> int:
    return sum(delivery.num_decoded for delivery in stats.deliveries)


def _is_plain_step(stats: StepStats) -> bool:
    """One token of each sequence was fed, and no prompt; what was decided was drawn."""
    return (
        not stats.num_prefill_tokens
        and stats.num_tokens == stats.num_sequences
        and not stats.tails
        and not stats.num_proposed
        and all(delivery.decoding.is_plain for delivery in stats.deliveries)
    )


def _is_plain(sequence: Sequence) -> bool:
    """It decodes by standard and is at the beginning of a round: all scorers lack one token."""
    return (
        sequence.schedule.is_plain
        and not sequence.num_pending
        and all(sequence.num_unseen(k) == 1 for k in sequence.decoding.combination.scorers)
    )

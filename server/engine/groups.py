"""Sequences that leave their decoding open, in groups: one choice is made for each group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Row
from dataclasses import dataclass, field

from server.core.sampling_params import DecodingParams
from server.core.sequence import Sequence
from server.engine.bounded import make_room
from server.engine.choices import make_choices
from server.engine.kind import Kind, kind_of
from server.engine.lookup_costs import LookupCosts
from server.engine.rates import Rates
from server.engine.trials import Trials

# Of all choices only the best few are compared each time, and all of them every so many times.
_SWEEP_PERIOD = 4
_NUM_NEAR = 8


@dataclass(slots=True, eq=False)
class Group:
    """Sequences that ask for the same decoding and take their tokens the same way.

    Attributes:
        choices: what may be chosen, standard decoding first if it is among them.
        chosen: what is, now.
        near: the best of them, when all were compared last, and the first.
        num_left: decisions until all are compared again.
        is_new: nothing was chosen yet.
        rates: of its texts when they were looked at last, or about that; of no model: never.
        trials: of what may be faster than standard decoding.
        lookup: what prompt lookup takes beside what is chosen; None where it is off.
        num_steps, seconds: of decoding, since something was chosen last.
    """

    choices: tuple[DecodingParams, ...]
    chosen: DecodingParams
    near: tuple[DecodingParams, ...] = ()
    num_left: int = 0
    is_new: bool = True
    rates: Rates = Rates(())
    trials: Trials = field(default_factory=Trials)
    lookup: LookupCosts | None = None
    num_steps: int = 0
    seconds: float = 0.0

    @property
    def baseline(self) -> DecodingParams | None:
        """Standard decoding; None where a strategy was asked for and it is no choice."""
        first = self.choices[0]
        return first if first.strategy == "standard" else None

    @property
    def compared(self) -> tuple[DecodingParams, ...]:
        """What the next choice is between."""
        return self.choices if self.num_left == 0 else (*self.near, self.chosen)

    def note_compared(self, seconds: dict[DecodingParams, float]) -> None:
        """All of `compared` take so many seconds a token."""
        if self.num_left == 0:
            best = sorted(self.choices[1:], key=lambda choice: seconds[choice])[:_NUM_NEAR]
            self.near = (self.choices[0], *best)
            self.num_left = _SWEEP_PERIOD
        self.num_left -= 1

    def note_rates(self, rates: Rates) -> None:
        """What is known of its texts now."""
        # What moves by less than a bucket's width would only go to and fro between profiles.
        if not self.rates.acceptance or rates.differs_from(self.rates):
            self.rates = rates

    def take(self, choice: DecodingParams) -> None:
        """Decode by `choice` from here on."""
        self.chosen = choice
        self.is_new = False
        self.num_steps, self.seconds = 0, 0.0

    def is_followed(self, members: Row[Sequence]) -> bool:
        """All of `members` have taken up what was chosen."""
        return all(sequence.schedule == self.chosen for sequence in members)


@dataclass(frozen=True, slots=True)
class Division:
    """Sequences that decode now, by group.

    Attributes:
        members: of each group.
        has_others: some leave nothing open; their steps and tokens would count as the groups'.
    """

    members: dict[Group, list[Sequence]]
    has_others: bool

    @property
    def num_members(self) -> int:
        return sum(map(len, self.members.values()))

    @property
    def is_united(self) -> bool:
        """There is one group, and all of it decodes by what was chosen."""
        return len(self.members) == 1 and all(
            group.is_followed(members) for group, members in self.members.items()
        )


class Groups:
    """Finds the group of a sequence."""

    def __init__(self, max_gamma: int) -> None:
        """`max_gamma`: longest proposals of a model."""
        self._max_gamma = max_gamma
        self._groups: dict[tuple[DecodingParams, Kind], Group] = {}
        # The same by the identity of parameters, which are kept with it: hashing them takes longer.
        self._by_id: dict[tuple[int, Kind], tuple[DecodingParams, Group]] = {}

    def of(self, sequence: Sequence) -> Group:
        """The group of `sequence`, whose decoding leaves something open."""
        decoding, kind = sequence.decoding, kind_of(sequence)
        known = self._by_id.get((id(decoding), kind))
        if known is not None:
            return known[1]
        if (decoding, kind) not in self._groups:
            make_room(self._groups)
            choices = make_choices(decoding, self._max_gamma)
            self._groups[decoding, kind] = Group(choices, choices[0])
        group = self._groups[decoding, kind]
        make_room(self._by_id)
        self._by_id[id(decoding), kind] = decoding, group
        return group

    def divide(self, running: Iterable[Sequence]) -> Division:
        """`running` by group, but for those that only read their prompt or what they lost."""
        members: dict[Group, list[Sequence]] = {}
        has_others = False
        for sequence in running:
            if sequence.is_resuming:
                continue
            if sequence.decoding.is_auto:
                members.setdefault(self.of(sequence), []).append(sequence)
            else:
                has_others = True
        return Division(members, has_others)

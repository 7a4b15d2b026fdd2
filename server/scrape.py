"""Reads Prometheus' text format: the little of it that one server's /metrics has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Labels = frozenset[tuple[str, str]]

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples at one moment.

    Attributes:
        moment: seconds of a clock that only goes forward.
        samples: values by name and labels.
    """

    moment: float
    samples: Mapping[str, Mapping[Labels, float]]

    def __contains__(self, name: str) -> bool:
        return name in self.samples

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples that have these labels; 0 where there are none."""
        wanted = frozenset(labels.items())
        return sum(value for key, value in self.samples.get(name, {}).items() if wanted <= key)

    def values(self, name: str, label: str) -> list[str]:
        """Values of a label, in the order of the scrape."""
        found = (dict(key).get(label) for key in self.samples.get(name, {}))
        return list(dict.fromkeys(value for value in found if value is not None))

    def info(self, name: str) -> dict[str, str]:
        """Labels of a sample that has only one value."""
        return {k: v for key in self.samples.get(name, {}) for k, v in key}


def parse_metrics(text: str, moment: float) -> Scrape:
    """Lines that are no samples are skipped."""
    samples: dict[str, dict[Labels, float]] = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None or line.startswith("#"):
            continue
        name, labels, value = match.groups()
        key = frozenset(_LABEL.findall(labels or ""))
        try:
            samples.setdefault(name, {})[key] = float(value)
        except ValueError:
            continue
    return Scrape(moment, samples)

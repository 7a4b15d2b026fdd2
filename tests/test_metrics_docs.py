"""docs/metrics.md and the code tell of the same series."""

from __future__ import annotations

import re

import promql_parser
import pytest

from server.metrics.requests import ENDPOINTS, FINISH_REASONS, REJECTIONS
from tests.test_docker import (
    ROOT,
    RULES,
    described_metrics,
    exported_metrics,
    queried_metrics,
)

SERIES, ALERTS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("\n## Alerts\n")
ROWS = re.findall(r"^\| `(\w+)` \|(.*?) \| (.*?) \| (.*?) \|$", SERIES, re.MULTILINE)


def test_every_metric_has_one_row() -> None:
    names = [name for name, *_ in ROWS]
    assert len(names) == len(set(names))
    assert set(names) == set(described_metrics())


def test_labels_are_those_of_the_code() -> None:
    labels = described_metrics()
    for name, listed, *_ in ROWS:
        assert set(filter(None, listed.strip().split(", "))) == labels[name], name


@pytest.mark.parametrize(("name", "query"), [(name, query) for name, _, _, query in ROWS])
def test_its_query_asks_for_it(name: str, query: str) -> None:
    if query == "see above":
        return
    promql_parser.parse(query.strip("`"))
    queried = queried_metrics(query.strip("`"))
    assert any(each.startswith(name) for each in queried)
    assert queried <= exported_metrics()


def test_reasons_are_those_of_the_code() -> None:
    meanings = {name: set(re.findall(r"`(\w+)`", meaning)) for name, _, meaning, _ in ROWS}
    assert meanings["cos_requests_finished_total"] == {*ENDPOINTS, *FINISH_REASONS}
    assert meanings["cos_requests_rejected_total"] == set(REJECTIONS)


def test_every_alert_has_one_row() -> None:
    rules = re.findall(
        r"alert: (\w+)\n.*?for: (\d+)m\n +labels: \{severity: (\w+)\}",
        RULES.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| .* for (\d+) minutes? \|$", ALERTS, re.MULTILINE)
    assert len(rows) == len(rules) == 8
    assert {(name, minutes, severity) for name, severity, minutes in rows} == set(rules)

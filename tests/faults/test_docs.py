"""docs/reliability.md tells of faults that tests produce."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_fault_in_the_table_has_its_test() -> None:
    table = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"\| `(test_\w+)` \|$", table, re.MULTILINE)
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    assert len(named) > 10
    for name in named:
        assert re.search(rf"def {name}\(", sources), name


def test_every_test_named_in_the_security_document_exists() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    for path in set(re.findall(r"`(tests/[\w/.]+)`", text)):
        assert (ROOT / path).exists(), path

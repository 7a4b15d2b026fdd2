"""Links between documents lead somewhere, and measured tables say what the results files do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from scripts import configuration

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
KINDS = {
    "contrastive, greedy": "contrastive-t0",
    "contrastive, temperature 1": "contrastive-t1",
    "weighted ½, temperature 1": "weighted-t1",
}


def anchors(document: Path) -> set[str]:
    """Of its headings."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return set(map(configuration._anchor, titles))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text(encoding="utf-8"))
    for link in links:
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_speedups_are_those_of_the_results(name: str) -> None:
    results = json.loads((ROOT / "docs/results/lockstep.json").read_text(encoding="utf-8"))
    rates = {
        (cell["kind"], cell["prompts"], cell["in_flight"]): [
            lane["num_tokens"] / lane["seconds"] for lane in cell["lanes"].values()
        ]
        for cell in results["cells"]
    }
    text = (ROOT / name).read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]*) \| (\w+) \|((?: \d+ → \d+ \([\d.]+\) \|){4})$", text, re.M)
    kind, found = "", 0
    for title, prompts, cells in rows:
        kind = KINDS[title.strip()] if title.strip() else kind
        for in_flight, cell in zip((1, 4, 16, 32), cells.split("|"), strict=False):
            standard, auto = rates[kind, prompts.lower(), in_flight]
            assert cell.strip() == f"{standard:.0f} → {auto:.0f} ({auto / standard:.2f})"
            found += 1
    assert found == len(rates) == 36

"""What is installed is pinned and hashed; nothing unpickles, nothing runs a model's code."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.audit import judge

ROOT = Path(__file__).parents[1]
# Modules that run what they read.
UNPICKLING = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "_pickle"}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in (ROOT / "server").rglob("*.py"):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    text = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8")
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", text, re.MULTILINE)
    return {normal(name): version for name, version in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_has_the_pins_and_their_hashes() -> None:
    text = (ROOT / "scripts" / "requirements.lock").read_text(encoding="utf-8")
    entries = re.findall(
        r"^([A-Za-z0-9._-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE
    )
    locked = {normal(name): version for name, version, _ in entries}
    assert text.count("==") == len(entries)
    assert locked == {name: version for name, version in pins().items() if name != "torch"}


def test_the_bill_of_materials_has_the_pins() -> None:
    bill = json.loads((ROOT / "sbom.json").read_text(encoding="utf-8"))
    assert bill["bomFormat"] == "CycloneDX"
    listed = {normal(each["name"]): each["version"] for each in bill["components"]}
    assert listed == pins()


def test_nothing_unpickles() -> None:
    for path, tree in sources():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not UNPICKLING & {name.partition(".")[0] for name in names}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                loaded = f"{node.value.id}.{node.attr}"
                assert loaded not in ("torch.load", "numpy.load", "np.load"), path


def test_no_call_may_run_a_models_code() -> None:
    calls = 0
    for path, tree in sources():
        for node in ast.walk(tree):
            # A field may be called `compile`; reading the name is another matter.
            if (
                isinstance(node, ast.Name)
                and isinstance(node.ctx, ast.Load)
                and node.id in ("eval", "exec", "compile", "__import__")
            ):
                pytest.fail(f"{path}: {node.id}")
            if not isinstance(node, ast.Call):
                continue
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code":
                    calls += 1
                    assert isinstance(keyword.value, ast.Constant), path
                    assert keyword.value.value is False, path
            if isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
                assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, path
    assert calls


REPORT: dict[str, Any] = {
    "dependencies": [
        {"name": "a", "version": "1", "vulns": []},
        {"name": "b", "skip_reason": "Dependency not found on PyPI"},
    ]
}


def test_the_audit_fails_on_what_is_known_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(REPORT) == 0
    assert "1 packages asked about, 1 unknown" in capsys.readouterr().out
    found = {"id": "PYSEC-1", "fix_versions": ["2"], "aliases": [], "description": ""}
    bad = {"name": "c", "version": "1", "vulns": [found]}
    assert judge({"dependencies": [*REPORT["dependencies"], bad]}) == 1
    assert "c 1: PYSEC-1, fixed in 2" in capsys.readouterr().out

"""Asks for known vulnerabilities of every pinned package: python -m scripts.audit.

Exit code 1 where one is known. A network that cannot be asked, or an index that does not know a
package, is reported and is no failure: builds without a network must work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PINS = Path(__file__).parent / "constraints.txt"
_SECONDS = 45


def main() -> int:
    """Audit scripts/constraints.txt."""
    try:
        report = _ask(PINS)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        sys.stdout.write(f"audit: not done: {error}\n")
        return 0
    return judge(report)


def judge(report: dict[str, Any]) -> int:
    """Print what pip-audit found; 1 where anything is vulnerable."""
    packages = report["dependencies"]
    skipped = [each for each in packages if "skip_reason" in each]
    vulnerable = [each for each in packages if each.get("vulns")]
    for package in vulnerable:
        for found in package["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "no version"
            sys.stdout.write(
                f"audit: {package['name']} {package['version']}: {found['id']}, fixed in {fixed}\n"
            )
    sys.stdout.write(
        f"audit: {len(packages) - len(skipped)} packages asked about, {len(skipped)} unknown to "
        f"the index, {len(vulnerable)} vulnerable\n"
    )
    return 1 if vulnerable else 0


def _ask(pins: Path) -> dict[str, Any]:
    """pip-audit's report. Raises ValueError where it has none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [
            *(sys.executable, "-m", "pip_audit", "--requirement", str(pins)),
            *("--no-deps", "--disable-pip", "--timeout", "5", "--progress-spinner", "off"),
            *("--format", "json", "--output", str(out)),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        if not out.exists():
            raise ValueError(done.stderr.strip().rpartition("\n")[2] or "pip-audit said nothing")
        report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return report


if __name__ == "__main__":
    sys.exit(main())

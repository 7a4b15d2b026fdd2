"""A server process over table LMs: python -m tests.support.table_server '{"pace": 0.02, ...}'.

Options: pace, seconds of a forward; fail_after, forwards until the engine breaks; the rest are
sections of the configuration, where `engine.cpu_kernels` is off unless it says otherwise: to
compile them takes longer than most tests.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.app import Parts
from server.engine.async_engine import AsyncEngine
from server.metrics import Metrics
from server.serve import serve
from tests.support.api import VOCAB_SIZE, DigitTokenizer, make_config, make_engine


def run(pace: float = 0.0, fail_after: int | None = None, **sections: Any) -> int:
    logging.basicConfig(level="INFO")
    engine_section = {"cpu_kernels": "off"} | sections.pop("engine", {})
    config = make_config(engine=engine_section, **sections)

    def load() -> Parts:
        engine, runners = make_engine(config, Metrics(config))
        for runner in runners:
            runner.seconds = pace
            runner.fail_after = fail_after
        return Parts(AsyncEngine(engine), DigitTokenizer(), VOCAB_SIZE)

    return serve(config, load)


def run_forked(options: dict[str, Any], environment: Mapping[str, str], log: Path) -> None:
    """The process, where it is a fork of one whose environment and streams are others'."""
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    sys.exit(run(**options))


if __name__ == "__main__":
    sys.exit(run(**json.loads(sys.argv[1])))

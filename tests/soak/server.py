"""The server under test: `cos-server serve` over two tiny models, in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from server.scrape import Scrape, parse_metrics
from tests.soak.workload import MODEL
from tests.support.live_server import wait_until
from tests.support.tiny_models import make_pair

# Far less than the load asks for: slots, queue and pages all run out.
ENGINE = {"max_sequences": 12, "max_waiting": 24, "kv_memory": "500KiB", "calibrate": False}


@dataclass
class Server:
    """A running server process."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    def find_url(self) -> str | None:
        assert self.process.poll() is None, self.log.read_text()
        match = re.search(r"listening on (http://\S+?),", self.log.read_text())
        return match and match[1]

    def is_ready(self) -> bool:
        return httpx.get(f"{self.url}/ready").status_code == 200

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        assert match is not None
        return int(match[1]) * 1024

    def scrape(self) -> Scrape:
        return parse_metrics(httpx.get(f"{self.url}/metrics", timeout=30).text, 0.0)


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """A ready server; ends by SIGTERM and must then exit with code 0."""
    config: dict[str, Any] = {
        "served_model_name": MODEL,
        "models": [
            {"name": path.name, "path": str(path), "dtype": "float32", "device": "cpu"}
            for path in make_pair(folder / "models")
        ],
        "combination": {"method": "weighted", "weights": [0.4, 0.6]},
        "engine": {**ENGINE, "threads": 1},
        "http": {"port": 0},
    }
    path, log = folder / "config.yaml", folder / "server.log"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "server", "serve", "--config", str(path)]
    with (
        log.open("wb") as stderr,
        subprocess.Popen(command, stderr=stderr, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run,
    ):
        server = Server(run, log)
        try:
            wait_until(lambda: server.find_url() is not None, 300)
            server.url = server.find_url() or ""
            wait_until(server.is_ready, 300)
            yield server
            run.send_signal(signal.SIGTERM)
            assert run.wait(60) == 0, log.read_text()[-2000:]
        finally:
            run.kill()

"""Times probes of a server from a process of its own: the load's client must not slow them down.

python -m tests.soak.probe URL: until stdin closes; prints {path: [seconds, ...]}.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from urllib.parse import urlsplit

PATHS = ("/health", "/metrics")
_INTERVAL = 0.2


def run(url: str) -> dict[str, list[float]]:
    stopped = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        stopped.set()

    threading.Thread(target=wait, daemon=True).start()
    host = urlsplit(url).netloc
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    while not stopped.wait(_INTERVAL):
        for path in PATHS:
            started = time.perf_counter()
            connection = http.client.HTTPConnection(host, timeout=60)
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            connection.close()
            times[path].append(time.perf_counter() - started)
            if response.status != 200:
                raise SystemExit(f"{path} answered {response.status}")
    return times


if __name__ == "__main__":
    json.dump(run(sys.argv[1]), sys.stdout)

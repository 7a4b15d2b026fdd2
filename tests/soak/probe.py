"""Times probes of a server from a process of its own: the load's client must not slow them down.

python -m tests.soak.probe URL: until stdin closes; prints {what: [seconds, ...]}. The control is a
connection to a process that answers at once and does nothing else: what the machine alone costs.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import socket
import sys
import threading
import time
from urllib.parse import urlsplit

PATHS = ("/health", "/metrics")
CONTROL = "control"
_INTERVAL = 0.2
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


def run(url: str) -> dict[str, list[float]]:
    stopped = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        stopped.set()

    host = urlsplit(url).netloc
    with socket.create_server(("127.0.0.1", 0)) as listener:
        echo = multiprocessing.get_context("fork").Process(target=_answer, args=(listener,))
        echo.start()  # before there is a second thread
        threading.Thread(target=wait, daemon=True).start()
        targets = {path: (host, path) for path in PATHS}
        targets[CONTROL] = (f"127.0.0.1:{listener.getsockname()[1]}", "/")
        times: dict[str, list[float]] = {name: [] for name in targets}
        try:
            while not stopped.wait(_INTERVAL):
                for name, target in targets.items():
                    times[name].append(_ask(*target))
        finally:
            echo.terminate()
    return times


def _ask(host: str, path: str) -> float:
    """Seconds from before the connection to the answer's last byte."""
    started = time.perf_counter()
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"{path} answered {response.status}")
    return time.perf_counter() - started


def _answer(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(_ANSWER)


if __name__ == "__main__":
    json.dump(run(sys.argv[1]), sys.stdout)

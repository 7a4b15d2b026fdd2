"""An app on a real port, in a thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from server.config import HttpConfig
from server.serve import _bind


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Poll; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened within {seconds} s")
        time.sleep(0.005)


@contextmanager
def run_server(app: FastAPI, phase: str = "ready") -> Iterator[str]:
    """Base URL of `app`, once its service is in `phase`."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    with _bind(HttpConfig(host="127.0.0.1", port=0)) as listener:
        # Connections inherit it: a client that does not read is noticed before megabytes are sent.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            # Kernels may have to be compiled first.
            wait_until(lambda: server.started and app.state.service.phase == phase, 60)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

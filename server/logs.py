"""Log lines, as text or as one JSON object each.

A record may carry `fields`, a mapping: JSON shows them as keys, text leaves them to its message.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# Of the HTTP request that a line was logged for, its X-Request-Id.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class JsonFormatter(logging.Formatter):
    """{"time", "level", "logger", "message", "request_id"?, "error"?} and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (current := request_id.get()) is not None:
            line["request_id"] = current
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            line.update(fields)
        return json.dumps(line, default=str)


def configure(level: str, style: LogFormat) -> None:
    """Send everything that is logged to stderr, for the whole process."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # Of one, debugging lines are what streams carry, the clients' texts; of the other, all that it
    # compiles, in a hundred thousand lines.
    for name in ("sse_starlette", "numba"):
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLogger().level))
    if style == "json" or not sys.stderr.isatty():
        # Bars of transformers and the hub, which read this when imported, would break the lines.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

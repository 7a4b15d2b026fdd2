"""The API key that this project's own clients send."""

from __future__ import annotations

import os

VARIABLE = "COS_API_KEY"


def authorization() -> dict[str, str]:
    """The header with the key of the environment variable; empty where there is none."""
    key = os.environ.get(VARIABLE, "").strip()
    return {"Authorization": f"Bearer {key}"} if key else {}

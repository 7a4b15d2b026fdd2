"""What clients' requests add to does not grow for ever."""

from __future__ import annotations

import pytest

from server.engine import bounded
from server.engine.bounded import make_room


def test_there_is_always_room_for_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MAX_KEPT", 3)
    kept: dict[int, int] = {}
    sizes = []
    for key in range(8):
        make_room(kept)
        kept[key] = key
        sizes.append(len(kept))
    assert sizes == [1, 2, 3, 1, 2, 3, 1, 2]

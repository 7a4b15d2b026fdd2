"""The soak, short; `python -m tests.soak` runs it as long as wanted."""

from __future__ import annotations

from pathlib import Path

from tests.soak.__main__ import faults
from tests.soak.server import serve
from tests.soak.soak import soak

_SECONDS = 45.0  # twice that, with the texts to compare with and the start of the server


def test_nothing_is_lost_or_mixed_up_under_overload(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        figures = soak(server, seconds=_SECONDS, num_clients=48, pool_size=24)
    # So short a run is all warm-up; what every request leaked would show all the same.
    assert faults(figures, max_growth=0.15) == []
    # A machine busy with much else still finishes twenty; none means that nothing was compared.
    assert figures["requests"]["finished, as alone"] >= 5
    for kind in ("left by the client", "invalid, refused", "429"):
        assert figures["requests"][kind] > 0, kind

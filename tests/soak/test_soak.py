"""The soak, short; `python -m tests.soak` runs it as long as wanted."""

from __future__ import annotations

from pathlib import Path

from tests.soak.__main__ import faults, table
from tests.soak.server import serve
from tests.soak.soak import soak

_SECONDS = 25.0  # of load; besides, the texts to compare with and the start of the server


def test_nothing_is_lost_or_mixed_up_under_overload(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        figures = soak(server, seconds=_SECONDS, num_clients=48, pool_size=24)
    # So short a run is all warm-up; what every request leaked would show all the same.
    assert faults(figures, max_growth=0.15) == []
    # A machine busy with much else still finishes twenty; none means that nothing was compared.
    assert figures["requests"]["finished, as alone"] >= 5
    for kind in ("left by the client", "invalid, refused", "429"):
        assert figures["requests"][kind] > 0, kind
    # The probes' own process, and one that answers at once, tell the machine's share of a delay.
    assert set(figures["probes"]) == {"/health", "/metrics", "control"}
    assert all(times["count"] > 0 for times in figures["probes"].values())
    assert set(figures["answers_before_the_load"]) <= {"/ready 200", "/ready 503"}
    assert "finished, as alone" in table(figures)

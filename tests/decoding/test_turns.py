"""The model that most sequences want, the earliest of several."""

from __future__ import annotations

import pytest

from server.decoding.turns import next_model


@pytest.mark.parametrize(
    ("wanted", "turn"),
    [({0: 1, 1: 15}, 1), ({1: 5, 0: 5}, 0), ({2: 0.5, 1: 0.3, 0: 0.2}, 2), ({1: 1}, 1)],
)
def test_most_go_first(wanted: dict[int, float], turn: int) -> None:
    assert next_model(wanted) == turn


def test_sequences_that_began_at_different_times_come_together() -> None:
    """Each wants model 1 twice, then model 0."""
    places = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    for _ in range(12):
        models = [int(place < 2) for place in places]
        turn = next_model({model: models.count(model) for model in models})
        places = [
            (place + 1) % 3 if model == turn else place
            for place, model in zip(places, models, strict=True)
        ]
    assert len(set(places)) == 1

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.decoding.combine import combine, log_combined, mix_logits, rank
from server.decoding.warp import Warp
from tests.support.exact import softmax

P = [[2.0, 0.0, -1.0]]
Q = [[0.5, 1.0, -1.0]]


def warp_of(**options: Any) -> Warp:
    decoding = DecodingParams("standard", Combination.only(2, 0), (1, 1))
    params = SamplingParams(**options)
    return Warp([(Sequence.start("s", [0], params, decoding), 1)], frozenset(), torch.device("cpu"))


def scores(model: int) -> torch.Tensor:
    return torch.tensor((Q, P)[model])


def test_weighted_warps_each_member_before_mixing() -> None:
    r = combine(scores, Combination.weighted([0.25, 0.75]), warp_of(temperature=0.5))
    expected = 0.25 * softmax(np.array(Q[0]) * 2) + 0.75 * softmax(np.array(P[0]) * 2)
    assert r[0].numpy() == pytest.approx(expected, abs=1e-6)


def test_contrastive_warps_the_mix() -> None:
    r = combine(scores, Combination.contrastive(2, 0.3), warp_of(temperature=0.5))
    expected = softmax((np.array(P[0]) - 0.3 * np.array(Q[0])) * 2)
    assert r[0].numpy() == pytest.approx(expected, abs=1e-6)


def test_plausibility_masks_by_the_expert() -> None:
    p = softmax(np.array(P[0]))
    threshold = float(p[1] / p[0]) * 1.01
    mix = mix_logits(scores, Combination.contrastive(2, 0.3, plausibility=threshold))
    assert mix.isinf().tolist() == [[False, True, True]]


def test_greedy_takes_the_argmax_at_temperature_one() -> None:
    """The most probable token of the combined distribution, not of any member's own."""
    rows = torch.tensor([[[1.0, 0.0, 0.9]], [[0.0, 1.0, 0.9]]])
    warp = warp_of(temperature=0.0, top_k=1)
    for combination in (Combination.weighted([0.5, 0.5]), Combination.linear([1.0, 1.0])):
        r = combine(lambda k: rows[k], combination, warp)
        assert rank(lambda k: rows[k], combination, warp).argmax(-1).tolist() == [2]
        assert r.argmax(-1).tolist() == [2]
    assert rank(lambda k: rows[k], Combination.only(2, 1), warp).argmax(-1).tolist() == [1]


def test_log_combined_ignores_warps() -> None:
    weights = (0.25, 0.75)
    expected = np.log(0.25 * softmax(np.array(Q[0])) + 0.75 * softmax(np.array(P[0])))
    assert log_combined(scores, Combination.weighted(weights))[0].numpy() == pytest.approx(
        expected, abs=1e-6
    )
    only = log_combined(scores, Combination.only(2, 1))
    assert torch.equal(only, torch.tensor(P).log_softmax(-1))


def test_log_combined_takes_from_warps_beside_what_tokens_are_plausible() -> None:
    combination = Combination.contrastive(2, 0.5, plausibility=0.5)
    beside_all = log_combined(scores, combination)[0].tolist()
    assert beside_all == [0, -torch.inf, -torch.inf]
    warp = warp_of(allowed_token_ids=(1, 2), temperature=0.5, top_k=1)
    mix = np.array(P[0][:2]) - 0.5 * np.array(Q[0][:2])
    expected = [*np.log(softmax(mix)), -np.inf]
    assert log_combined(scores, combination, warp)[0].numpy() == pytest.approx(expected, abs=1e-6)


def test_a_zero_of_a_positive_member_wins_over_a_zero_of_a_negative_one() -> None:
    rows = torch.tensor([[[-torch.inf, -torch.inf, 0.0]], [[-torch.inf, 1.0, 0.0]]])
    mix = mix_logits(lambda k: rows[k], Combination.contrastive(2, 0.5))
    assert mix[0, 0] == -torch.inf
    assert mix[0, 1] == 1 + 0.5 * 1e4


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: Combination.weighted([0.5, 0.6]), "sum to 1"),
        (lambda: Combination.weighted([1.5, -0.5]), "negative"),
        (lambda: Combination.weighted([float("nan"), 1.0]), "finite"),
        (lambda: Combination.contrastive(1, 0.1), "two models"),
        (lambda: Combination.linear([0.0, 0.0]), "not be zero"),
    ],
)
def test_bad_combinations_are_refused(build, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build()


def test_weights_that_float32_does_not_hold_are_zero() -> None:
    """Else kernels, which read them in float32, would not agree with whom coins and scorers ask."""
    assert Combination.weighted([1e-46, 1.0]) == Combination.weighted([0.0, 1.0])
    assert Combination.weighted([1e-46, 0.5, 0.5]).scorers == (1, 2)
    assert Combination.contrastive(2, 1e-46).scorers == (1,)
    assert Combination.linear([1e-46, -1.0]).weights == (0.0, -1.0)
    assert Combination.weighted([1e-20, 1.0]).scorers == (0, 1)
    with pytest.raises(ValueError, match="not be zero"):
        Combination.linear([1e-46, 0.0])

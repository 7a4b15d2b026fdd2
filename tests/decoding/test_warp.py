from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.core.combination import Combination
from server.core.proposal import Proposal
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.decoding import warp
from server.decoding.warp import Warp
from tests.support.exact import softmax, warped

CPU = torch.device("cpu")
DECODING = DecodingParams("standard", Combination.only(1, 0), (1,))
EOS = frozenset({3})


def place(prompt: list[int], made: list[int], **options: Any) -> tuple[Sequence, int]:
    sequence = Sequence.start("s", prompt, SamplingParams(max_tokens=99, **options), DECODING)
    for token in made:
        sequence.draw(token)
    return sequence, len(sequence)


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"top_k": 9, "top_p": 0.7, "temperature": 1.5},
    {"top_p": 0.9, "min_p": 0.1, "top_k": 30},
    {"presence_penalty": 1.0, "frequency_penalty": -0.5},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "presence_penalty": 0.9, "frequency_penalty": 0.2},
    {"logit_bias": ((4, 5.0), (0, -100.0)), "top_k": 3},
    {"allowed_token_ids": (2, 7, 11)},
    {"temperature": 0.0, "top_k": 2, "presence_penalty": 0.5},
]


@pytest.mark.parametrize("vocab_size", [40, 3000])
def test_rows_equal_the_plain_loops(vocab_size: int) -> None:
    """All cases in one batch, so that no row's warp leaks into another; 3000 exceeds the head."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(len(CASES), vocab_size)).astype(np.float32)
    prompt, made = [1, 4], [7, 4, 7]
    places = [place(prompt, made, **case) for case in CASES]
    probs = Warp(places, EOS, CPU).probs(torch.from_numpy(logits))
    for row, (sequence, _) in enumerate(places):
        expected = softmax(warped(logits[row].astype(float), sequence.params, prompt, made))
        assert probs[row].numpy() == pytest.approx(expected, abs=2e-6)
        assert ((probs[row].numpy() > 0) == (expected > 0)).all()


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, 0),
        ({"temperature": 0.0, "top_p": 0.5}, 0),
        ({"temperature": 0.5}, 1),
        ({"top_p": 0.5}, 1),
        ({"temperature": 0.5, "top_k": 3}, 2),
    ],
)
def test_a_device_is_sent_what_rows_use(
    options: dict[str, Any], sent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each of them is a pinned copy and an event."""
    copies: list[Any] = []

    def tensor_on(device: torch.device, values: Any) -> torch.Tensor:
        copies.append(values)
        return torch.tensor(values, device=device)

    monkeypatch.setattr(warp, "tensor_on", tensor_on)
    Warp([place([1], [2], **options), place([1], [2])], EOS, CPU)(torch.zeros(2, 5))
    assert len(copies) == sent


def test_pending_tokens_count_for_penalties() -> None:
    sequence, _ = place([1], [2], frequency_penalty=1.0)
    sequence.propose(2, Proposal(0))
    logits = torch.zeros(2, 5)
    warp = Warp([(sequence, 2), (sequence, 3)], EOS, CPU)
    assert warp(logits)[:, 2].tolist() == [-1.0, -2.0]
    assert logits.abs().sum() == 0


def test_min_tokens_masks_every_way_to_stop() -> None:
    early = place([1], [2], min_tokens=2, stop_token_ids=frozenset({5}))
    late = place([1], [2, 2], min_tokens=2, stop_token_ids=frozenset({5}))
    ignoring = place([1], [2], min_tokens=2, ignore_eos=True, stop_token_ids=frozenset({5}))
    masked = Warp([early, late, ignoring], EOS, CPU)(torch.zeros(3, 6)).isinf()
    assert masked[:, [3, 5]].tolist() == [[True, True], [False, False], [False, True]]


def test_what_is_proposed_comes_from_the_head_of_a_flat_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warp, "_HEAD", 3)
    logits = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1]])
    places = [
        place([1], [], top_p=0.95),
        place([1], [], top_k=4),
        place([1], [], top_p=0.95, top_k=2),
        place([1], [], top_k=5),
        place([1], [], top_k=4, top_p=0.8),
        place([1], [], top_k=4, top_p=0.65),
    ]
    logits = logits.repeat(len(places), 1)
    # Of the four that top-k leaves, the first three have less than 0.8 of the probability, and the
    # first two less than 0.65, which is not what they have of the head.
    assert Warp(places, EOS, CPU)(logits).isfinite().sum(-1).tolist() == [5, 4, 2, 5, 4, 3]
    for rows in ([0, 1, 2, 3, 4, 5], [0], [1], [2], [2, 0], [3], [4, 3], [5]):
        warp_of_rows = Warp([places[row] for row in rows], EOS, CPU, proposing=True)
        kept = warp_of_rows(logits[rows]).isfinite().sum(-1).tolist()
        assert kept == [(3, 3, 2, 5, 3, 2)[row] for row in rows]


class _Counting(TorchDispatchMode):
    """Counts the operations that are asked of a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_warps_of_many_rows_take_no_more_operations() -> None:
    """On a GPU each is a launch, which takes as long for one number as for a thousand rows."""
    counts = []
    for num_rows in (2, 32):
        places = [
            place(
                [1, 2, row % 7],
                [3, 4],
                repetition_penalty=1.2,
                frequency_penalty=0.3,
                logit_bias=((5, 1.0), (6, -1.0)),
                bad_words=((3, 4, 9),),
                min_tokens=9,
                top_k=5,
                top_p=0.9,
            )
            for row in range(num_rows)
        ]
        logits = torch.randn(num_rows, 40)
        with _Counting() as counting:
            Warp(places, EOS, CPU)(logits)
        counts.append(counting.count)
    assert counts[0] == counts[1]

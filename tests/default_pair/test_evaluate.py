"""The evaluation's arithmetic against plain loops, and the whole script on a tiny pair."""

import json
import math

import pytest
import torch

from scripts import evaluate_pair
from tests.support.tiny_models import make_pair


def softmax(logits):
    exps = [math.exp(x) for x in logits]
    return [x / sum(exps) for x in exps]


def shared(a, b):
    return sum(min(x, y) for x, y in zip(a, b, strict=True))


def test_shared_mass_matches_plain_loops():
    generator = torch.Generator().manual_seed(0)
    expert, proposer = torch.randn(2, 3, 7, generator=generator)
    shortlist = [4, 1, 6]
    figures = evaluate_pair.shared_mass(
        expert, proposer, mu=0.1, weight=0.3, shortlists={"3": torch.tensor(shortlist)}
    )
    for row in range(3):
        lp, lq = expert[row].tolist(), proposer[row].tolist()
        p, q = softmax(lp), softmax(lq)
        contrastive = softmax([a - 0.1 * b for a, b in zip(lp, lq, strict=True)])
        weighted = [0.7 * a + 0.3 * b for a, b in zip(p, q, strict=True)]
        drawn = softmax([lq[i] for i in shortlist])
        expected = {
            "overlap": shared(p, q),
            "contrastive_proposer": shared(q, contrastive),
            "contrastive_expert": shared(p, contrastive),
            "weighted_proposer": shared(q, weighted),
            "weighted_expert": shared(p, weighted),
            "mass 3": sum(p[i] for i in shortlist),
            "overlap 3": shared([p[i] for i in shortlist], drawn),
        }
        assert {n: v[row].item() for n, v in figures.items()} == pytest.approx(expected, rel=1e-5)


def test_prompts_are_evenly_spread(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(10)))
    assert evaluate_pair.read_prompts(file, 3) == ["0", "3", "6"]
    assert len(evaluate_pair.read_prompts(file, 99)) == 10


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_pair_of_equal_models_overlaps_fully(noise, tmp_path):
    expert, proposer = make_pair(tmp_path, noise=noise)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the data"}\n{"prompt": "a number is"}\n')
    (tmp_path / "short.json").write_text(json.dumps(list(range(0, 300, 2))))
    places = ["--expert", str(expert), "--proposer", str(proposer)]
    small = ["--new-tokens", "6", "--batch", "2", "--timed-runs", "2", "--sizes", "100"]
    out = ["--out", str(tmp_path / "out.json"), "--shortlist", str(tmp_path / "short.json")]
    evaluate_pair.main([str(tmp_path / "prompts.jsonl"), *places, *small, *out])
    (report,) = json.loads((tmp_path / "out.json").read_text())["files"]
    assert report["prompts"] == 2
    assert 0 < report["shortlists"]["100"]["overlap"] <= report["shortlists"]["100"]["mass"] < 1
    if noise:
        assert 0 < report["overlap"] < 0.999
        assert report["weighted_proposer"] == pytest.approx(report["weighted_expert"], abs=1e-5)
    else:
        assert report["overlap"] == pytest.approx(1, abs=1e-4)
        assert report["greedy_agreement"] == 1

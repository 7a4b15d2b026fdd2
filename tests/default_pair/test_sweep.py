"""The sweep over proposers decodes what it says it does."""

import json

from scripts import sweep_pair
from tests.support.tiny_models import make_pair


def test_all_lengths_of_a_pair_write_the_same_greedy_text(tmp_path, capsys, monkeypatch):
    proposer, expert = make_pair(tmp_path)
    (proposer / "shortlist.json").write_text(json.dumps(list(range(40))))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the data"}\n{"prompt": "a b c"}\n')
    texts: dict[str, set[tuple[int, ...]]] = {}
    decode = sweep_pair.decode

    def remember(pair, prompt, gamma, seed, options):
        ids = decode(pair, prompt, gamma, seed, options)
        texts.setdefault(prompt, set()).add(tuple(ids))
        return ids

    monkeypatch.setattr(sweep_pair, "decode", remember)
    monkeypatch.setattr(sweep_pair, "CONTEXT", 64)
    words = f"--expert {expert} --proposers listed={proposer} whole={proposer}:whole"
    words += f" --prompts {tmp_path / 'prompts.jsonl'} --gamma 1 3 --new-tokens 12"
    sweep_pair.main(words.split())
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("listed", "whole", "standard", "cos γ = 3"))
    assert [len(ids) for ids in texts.values()] == [1, 1]


def test_acceptance_and_speed():
    tally = sweep_pair.Tally(tokens=10, seconds=2.0, verified=8, accepted=6)
    assert tally.speed == 5.0
    assert tally.acceptance == 0.75

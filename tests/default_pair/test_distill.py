"""Distillation on a tiny random expert: writing, shards, training step, resuming."""

import argparse
import asyncio
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from scripts.distill import plot, prompts, train
from scripts.distill.attention import ATTENTION
from scripts.distill.corpus import load_shard, save_shard, shard_path
from scripts.distill.expert import Writer, draw
from scripts.distill.losses import LossWeights, VocabularySampler, distillation_loss
from scripts.distill.shortlist import frequent_tokens
from server.default_pair.build import layer_index
from tests.support.tiny_models import VOCAB_SIZE, make_model

HIDDEN = 32


def make_expert():
    return make_model(num_hidden_layers=4, tie_word_embeddings=True)


def write_some(count=6, seed=0, temperature=1.0, num_new=8):
    rng = random.Random(seed)
    ids = [[rng.randrange(256) for _ in range(3 + i)] for i in range(count)]
    generator = torch.Generator().manual_seed(seed)
    return Writer(make_expert(), [VOCAB_SIZE]).write(ids, [temperature] * count, num_new, generator)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A saved expert with one training and one held-out shard."""
    folder = tmp_path_factory.mktemp("distill")
    make_expert().save_pretrained(folder / "expert")
    for name, seed in (("train", 0), ("dev", 1)):
        heats = [1.0, 0.0] * 3
        save_shard(shard_path(folder / name, 0), write_some(seed=seed), heats, ["text"] * 6)
    return folder


def make_trainer(workshop, out, **settings):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    places = {"expert": "expert", "shards": "train", "dev": "dev"}
    words = [w for k, v in places.items() for w in (f"--{k}", str(workshop / v))]
    options = parser.parse_args(
        [*words, "--out", str(out), "--steps", "4", "--layers", "0,3", "--passes", "1"]
    )
    small = {"micro_tokens": 24, "frequent": 64, "rare": 32, "warmup": 2, "dev_every": 2}
    vars(options).update(small | {"device": "cpu"} | settings)
    return train.Trainer(options)


def test_a_batch_writes_what_each_prompt_gets_alone():
    expert = make_expert()
    writer = Writer(make_expert(), [VOCAB_SIZE])
    ids = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    written = writer.write(ids, [0.0, 0.0], 10, torch.Generator())
    for prompt, one in zip(ids, written, strict=True):
        with torch.no_grad():
            reference = expert(one.token_ids[None], output_hidden_states=True)
        assert one.num_prompt == len(prompt)
        assert one.token_ids[: len(prompt)].tolist() == prompt
        greedy = reference.logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert one.token_ids[len(prompt) :].tolist() == greedy.tolist()
        torch.testing.assert_close(one.hidden, reference.hidden_states[-1][0, :-1])


def test_writing_ends_at_the_first_stop_token():
    free = write_some(count=1, temperature=0.0)[0]
    stop = int(free.token_ids[free.num_prompt + 2])
    first = free.token_ids[free.num_prompt :].tolist().index(stop)
    prompt = free.token_ids[: free.num_prompt].tolist()
    (one,) = Writer(make_expert(), [stop]).write([prompt], [0.0], 8, torch.Generator())
    assert one.token_ids.tolist() == free.token_ids[: free.num_prompt + first + 1].tolist()
    assert len(one.hidden) == len(one.token_ids) - 1


def test_writing_is_a_function_of_the_seed():
    first, again, other = (write_some(seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(first, again, strict=True))
    assert any(
        a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(first, other, strict=True)
    )


def test_shard_round_trip(tmp_path):
    written = write_some()
    total = save_shard(shard_path(tmp_path, 7), written, [1.0] * 6, ["text"] * 6)
    shard = load_shard(shard_path(tmp_path, 7))
    assert total == len(shard.token_ids) == int(shard.starts[-1])
    start, end = shard.starts[2], shard.starts[3]
    assert torch.equal(shard.token_ids[start:end].long(), written[2].token_ids)
    assert torch.equal(shard.hidden[start : end - 1], written[2].hidden.half())
    assert shard.num_prompt.tolist() == [w.num_prompt for w in written]


def test_cuts_cover_each_row_once(workshop):
    shard = load_shard(shard_path(workshop / "train", 0))
    rows = [row for rows in train.cut(shard, 24) for row in rows]
    assert rows == list(range(shard.num_sequences))


def test_distillation_is_a_function_of_the_seed(workshop, tmp_path):
    for name in ("a", "b"):
        make_trainer(workshop, tmp_path / name).run()
    make_trainer(workshop, tmp_path / "c", seed=1).run()
    a, b, c = (load_file(tmp_path / name / train.LAYERS) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_a_resumed_run_ends_where_an_unbroken_one_does(workshop, tmp_path):
    make_trainer(workshop, tmp_path / "whole").run()
    make_trainer(workshop, tmp_path / "halves", steps=2).run()
    second = make_trainer(workshop, tmp_path / "halves")
    second.resume()
    assert second.step == 2
    second.run()
    whole, halves = (load_file(tmp_path / n / train.LAYERS) for n in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_a_run_may_start_where_another_ended(workshop, tmp_path):
    first = make_trainer(workshop, tmp_path / "first")
    first.run()
    second = make_trainer(workshop, tmp_path / "second", start=tmp_path / "first")
    second.resume()
    assert second.step == 0
    expected = first.student.state_dict()
    assert all(torch.equal(w, expected[n]) for n, w in second.student.state_dict().items())


def test_training_changes_layers_and_lowers_the_loss(workshop, tmp_path):
    trainer = make_trainer(workshop, tmp_path, steps=30, learning_rate=1e-2)
    head = trainer.student.lm_head.weight.clone()
    trainer.run()
    lines = (tmp_path / train.LOG).read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert torch.equal(trainer.student.lm_head.weight, head)
    assert not any("embed" in name for name in load_file(tmp_path / train.LAYERS))


def test_frozen_layers_are_neither_trained_nor_stored(workshop, tmp_path):
    trainer = make_trainer(workshop, tmp_path, layers="0,1,3", frozen=2, steps=6)
    before = {n: w.clone() for n, w in trainer.student.state_dict().items()}
    trainer.run()
    moved = {n for n, w in trainer.student.state_dict().items() if not torch.equal(w, before[n])}
    stored = set(load_file(tmp_path / train.LAYERS))
    assert moved <= stored
    assert {layer_index(name) for name in moved} == {2, -1}
    assert {layer_index(name) for name in stored} == {2, -1}


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(0.5, 2.0, 0.3)])
def test_the_gradient_is_that_of_autograd(weights):
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(20, HIDDEN, generator=generator)
    student, expert = torch.randn(2, 300, HIDDEN, generator=generator)
    student = student.requires_grad_()
    vocabulary = VocabularySampler(head, torch.arange(8), 6).draw(generator)
    loss, _ = distillation_loss(student, expert, vocabulary, weights)
    loss.backward()
    p = (expert @ vocabulary.weight.T + vocabulary.correction).softmax(-1)
    plain = student.detach().clone().requires_grad_()
    log_q = (plain @ vocabulary.weight.T + vocabulary.correction).log_softmax(-1)
    entropy = -(p * log_q).sum(-1).mean()
    variation = 0.5 * (p - log_q.exp()).abs().sum(-1).mean()
    state = 1 - torch.cosine_similarity(plain, expert, dim=-1).mean()
    expected = weights.kl * entropy + weights.variation * variation + weights.state * state
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_training_attention_is_causal_attention():
    model = make_expert()
    ids = torch.randint(0, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model.set_attn_implementation(ATTENTION)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_learning_rate_warms_up_and_decays(workshop, tmp_path):
    options = make_trainer(workshop, tmp_path, steps=100, warmup=10, decay_steps=20).options
    rates = [train.learning_rate(step, options) / options.learning_rate for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[50] == rates[80] == 1
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == 0


def test_loss_on_the_whole_vocabulary_is_exact():
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(20, HIDDEN, generator=generator)
    student, expert = torch.randn(2, 5, HIDDEN, generator=generator)
    vocabulary = VocabularySampler(head, torch.arange(20), 8).draw(generator)
    p, q = (expert @ head.T).softmax(-1), (student @ head.T).softmax(-1)
    loss, beta = distillation_loss(student, expert, vocabulary, LossWeights(1.0, 0.0, 0.0))
    torch.testing.assert_close(loss, -(p * q.log()).sum(-1).mean())
    torch.testing.assert_close(beta, torch.minimum(p, q).sum(-1).mean())


def test_sampled_normaliser_is_unbiased():
    """The mean of 400 draws; a relative error above 5 % has probability below 1e-6 here."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(60, HIDDEN, generator=generator) * 0.1
    hidden = torch.randn(HIDDEN, generator=generator)
    sampler = VocabularySampler(head, torch.arange(10), 16)
    draws = [sampler.draw(generator) for _ in range(400)]
    estimates = [(v.weight @ hidden + v.correction).exp().sum() for v in draws]
    exact = (head @ hidden).exp().sum()
    assert torch.stack(estimates).mean() == pytest.approx(exact.item(), rel=0.05)


def test_frequent_tokens_are_ranked_by_probability(workshop):
    head = make_expert().lm_head.weight.detach()
    shards = [load_shard(shard_path(workshop / "dev", 0))]
    ids = frequent_tokens(shards, head, 5)
    mass = (shards[0].hidden[::4].float() @ head.T).softmax(-1).sum(0)
    assert ids.tolist() == mass.argsort(descending=True)[:5].tolist()


def test_prompts_are_a_function_of_seed_and_index():
    problems = [prompts.Problem(f"How many is {i} and one?", f"{i + 1}") for i in range(20)]
    make = [prompts.PromptSource(problems, ["def f():\n"], seed) for seed in (0, 0, 1)]
    first, again, other = ([source[i] for i in range(40)] for source in make)
    assert first == again
    assert first != other
    assert {p.kind for p in first} == {"math", "code", "choice", "chat", "text"}


def test_excluded_questions_are_left_out(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        '{"question": "One?", "answer": "<<1=1>>1"}\n{"question": "Two?", "answer": "2"}\n'
    )
    (tmp_path / "eval.jsonl").write_text('{"prompt": "Question: Two?\\nAnswer:"}\n')
    problems = prompts.load_problems(tmp_path / "train.jsonl", [tmp_path / "eval.jsonl"])
    assert problems == [prompts.Problem("One?", "1")]


def test_documented_functions_end_with_their_docstring():
    functions = prompts.load_functions()
    assert len(functions) > 100
    assert all(text.startswith("def ") and text.rstrip()[-1] in "\"'" for text in functions)


def test_curves_take_the_later_entry_of_a_repeated_step(tmp_path):
    rows = [
        {"step": 1, "loss": 3.0, "tokens": 5e5},
        {"step": 2, "loss": 2.5, "tokens": 5e5},
        {"step": 2, "loss": 2.0, "tokens": 5e5},
        {"step": 2, "dev_beta": 0.4, "dev_agreement": 0.3},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    curves = plot.read_curves(tmp_path / "log.jsonl")
    assert curves.loss == [3.0, 2.0]
    assert curves.tokens == [0.5, 1.0]
    assert (curves.dev_tokens, curves.dev_overlap) == ([1.0], [0.4])
    assert plot.smooth([1.0, 3.0]) == [1.0, 2.0]


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -40.0]]).expand(20_000, -1)
    drawn = draw(logits, torch.full((20_000, 1), 2.0), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn[:, 0], minlength=4) / 20_000
    torch.testing.assert_close(shares, (logits[0] / 2).softmax(-1), atol=0.02, rtol=0)
    assert shares[3] == 0
    assert draw(logits[:2], torch.zeros(2, 1), torch.Generator()).tolist() == [[2], [2]]


def test_the_wide_mix_is_a_function_of_the_index_and_has_all_kinds(tmp_path, monkeypatch):
    shutil.copytree(Path(asyncio.__file__).parent, tmp_path / "asyncio")
    left_out = tmp_path / min(prompts.LEFT_OUT)
    left_out.mkdir()
    (left_out / "bad.py").write_text("def broken(:\n")
    few = SimpleNamespace(get_paths=lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(prompts, "sysconfig", few)
    library = prompts.load_library()
    problems = [prompts.Problem(f"Question {i}?", f"{i}") for i in range(9)]
    source, again = (
        prompts.WidePromptSource(problems, ["def f():\n"], library, seed=3) for _ in range(2)
    )
    drawn = [source[i] for i in range(200)]
    assert drawn == [again[i] for i in range(200)]
    assert {prompt.kind for prompt in drawn} == {"math", "code", "choice", "chat", "text"}
    assert {prompt.drawn for prompt in drawn if prompt.kind == "text"} == {True}
    assert len(library) > 100

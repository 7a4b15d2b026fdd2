"""`train`: a few layers learn to write what the expert writes.

Training makes passes over the first N shards, N growing from pass to pass, and waits for a shard
that isn't there yet: generating and training overlap, in the order they would have without.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from scripts.distill.attention import ATTENTION
from scripts.distill.corpus import Shard, load_shard, shard_path
from scripts.distill.losses import (
    LossWeights,
    VocabularySampler,
    distillation_loss,
    overlap,
)
from scripts.distill.shortlist import frequent_tokens
from server.default_pair.build import FROZEN, layer_index, take_layers

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
LAYERS = "proposer.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--expert", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--shards", type=Path, required=True, help="folder made by `generate`")
    parser.add_argument("--dev", type=Path, required=True, help="held-out shards")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint, log and layers")
    parser.add_argument("--layers", default="0,1,28,29", help="expert layers to start from")
    parser.add_argument("--frozen", type=int, default=0, help="of them, first ones not trained")
    parser.add_argument("--start", type=Path, help="another run's folder: begin where it ended")
    parser.add_argument("--passes", default="4,8,16,32,64", help="shards of each pass over them")
    parser.add_argument("--steps", type=int, required=True, help="last step, reached or not")
    parser.add_argument("--decay-steps", type=int, default=0, help="linear decay before the last")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--micro-tokens", type=int, default=1024, help="tokens of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--frequent", type=int, default=4096, help="shortlist in the loss")
    parser.add_argument("--rare", type=int, default=2048, help="sampled tokens in the loss")
    parser.add_argument("--variation", type=float, default=1.0, help="weight of total variation")
    parser.add_argument("--state", type=float, default=1.0, help="weight of the hidden state")
    parser.add_argument("--dev-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    token_ids: Tensor  # [rows, width], padded on the right
    expert: Tensor  # [real tokens, hidden_size]
    real: Tensor  # [rows, width]: True where the expert's state is known


class Data:
    """Shards, loaded once each, cut into micro-batches."""

    def __init__(self, folder: Path, micro_tokens: int) -> None:
        self._folder = folder
        self._micro_tokens = micro_tokens
        self._loaded: dict[int, tuple[Shard, list[range]]] = {}

    def order(self, passes: list[int], seed: int) -> Iterator[tuple[int, range]]:
        """(shard, rows) of every micro-batch; the last pass repeats for ever."""
        number = 0
        while True:
            count = passes[min(number, len(passes) - 1)]
            cuts = [(s, rows) for s in range(count) for rows in self._get(s)[1]]
            random.Random(f"{seed}/{number}").shuffle(cuts)
            yield from cuts
            number += 1

    def micro_batch(self, shard_index: int, rows: range, device: str) -> MicroBatch:
        shard, _ = self._get(shard_index)
        spans = [(int(shard.starts[r]), int(shard.starts[r + 1])) for r in rows]
        width = max(end - start for start, end in spans)
        tokens = torch.zeros(len(spans), width, dtype=torch.long)
        real = torch.zeros(len(spans), width, dtype=torch.bool)
        for row, (start, end) in enumerate(spans):
            tokens[row, : end - start] = shard.token_ids[start:end]
            real[row, : end - start - 1] = True
        expert = torch.cat([shard.hidden[start : end - 1] for start, end in spans])
        return MicroBatch(tokens.to(device), expert.to(device), real.to(device))

    def _get(self, index: int) -> tuple[Shard, list[range]]:
        if index not in self._loaded:
            path = shard_path(self._folder, index)
            while not path.exists():
                time.sleep(2)
            shard = load_shard(path)
            self._loaded[index] = (shard, cut(shard, self._micro_tokens))
        return self._loaded[index]


def cut(shard: Shard, micro_tokens: int) -> list[range]:
    """Consecutive rows of about `micro_tokens` tokens; rows of a shard have similar lengths."""
    cuts, start = [], 0
    for row in range(1, shard.num_sequences + 1):
        if shard.starts[row] - shard.starts[start] >= micro_tokens or row == shard.num_sequences:
            cuts.append(range(start, row))
            start = row
    return cuts


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, constant, linear decay to zero at the last step."""
    rate: float = options.learning_rate * min(1.0, (step + 1) / options.warmup)
    if options.decay_steps:
        rate *= min(1.0, max(0.0, (options.steps - step) / options.decay_steps))
    return rate


def start_student(
    expert: LlamaForCausalLM, layers: tuple[int, ...], frozen: int = 0
) -> LlamaForCausalLM:
    """The expert's embeddings and head around copies of some of its layers.

    Embeddings, head and the first `frozen` layers stay as they are.
    """
    state = {n: w for n, w in expert.state_dict().items() if n != "lm_head.weight"}
    config, state = take_layers(expert.config, state, layers)
    student = LlamaForCausalLM(config)
    student.load_state_dict(state, strict=False)
    student.tie_weights()
    student.set_attn_implementation(ATTENTION)
    student.model.embed_tokens.weight.requires_grad_(False)
    student.model.layers[:frozen].requires_grad_(False)
    return student


class Trainer:
    """A student, its optimizer and its place in the data; saved and resumed as one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        expert = AutoModelForCausalLM.from_pretrained(options.expert, dtype=torch.float32)
        layers = tuple(map(int, options.layers.split(",")))
        self.student = start_student(expert, layers, options.frozen).to(options.device)
        self.head = self.student.lm_head.weight.detach().to(torch.bfloat16)
        self.data = Data(options.shards, options.micro_tokens)
        self.step = 0
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.dev = [load_shard(p) for p in sorted(options.dev.glob("*.safetensors"))]
        frequent = frequent_tokens(self.dev, self.head, options.frequent)
        self.sampler = VocabularySampler(self.head, frequent, options.rare)

    def resume(self) -> None:
        """Goes on where the run was left, or from another run's end at step 0."""
        path = self.options.out / CHECKPOINT
        if path.exists():
            self.step = self._load(path)
        elif self.options.start:
            self._load(self.options.start / CHECKPOINT)

    def _load(self, path: Path) -> int:
        saved = torch.load(path, map_location=self.options.device)
        self.student.load_state_dict(saved["student"])
        self.optimizer.load_state_dict(saved["optimizer"])
        step: int = saved["step"]
        return step

    def save(self) -> None:
        self.options.out.mkdir(parents=True, exist_ok=True)
        state = self.student.state_dict()
        fresh = self.options.out / "checkpoint.new"
        saved = {"student": state, "optimizer": self.optimizer.state_dict(), "step": self.step}
        torch.save(saved, fresh)
        fresh.replace(self.options.out / CHECKPOINT)
        layers = {
            name: weight.to(torch.bfloat16).cpu().contiguous()
            for name, weight in state.items()
            if layer_index(name) >= self.options.frozen or name == "model.norm.weight"
        }
        meta = {
            "format": "pt",
            "expert_layers": self.options.layers,
            FROZEN: str(self.options.frozen),
            "step": str(self.step),
        }
        save_file(layers, self.options.out / LAYERS, metadata=meta)

    def run(self) -> None:
        order = self.data.order([int(n) for n in self.options.passes.split(",")], self.options.seed)
        for _ in range(self.step * self.options.micro_batches):
            next(order)
        with tqdm(initial=self.step, total=self.options.steps, smoothing=0.05) as bar:
            while self.step < self.options.steps:
                bar.set_postfix(self._advance(order))
                bar.update()
                if self.step % self.options.dev_every == 0 or self.step == self.options.steps:
                    self._log(self.evaluate())
                    self.save()

    def _advance(self, order: Iterator[tuple[int, range]]) -> dict[str, str]:
        seen = self.train_step([next(order) for _ in range(self.options.micro_batches)])
        self._log(seen)
        return {name: f"{value:.3f}" for name, value in seen.items()}

    def train_step(self, cuts: list[tuple[int, range]]) -> dict[str, float]:
        """One optimizer step over some micro-batches."""
        rate = learning_rate(self.step, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.step)
        weights = LossWeights(variation=self.options.variation, state=self.options.state)
        losses, overlaps, tokens = [], [], 0
        for shard, rows in cuts:
            batch = self.data.micro_batch(shard, rows, self.options.device)
            vocabulary = self.sampler.draw(generator)
            with torch.autocast(self.options.device, torch.bfloat16):
                hidden = self.student.model(batch.token_ids, use_cache=False).last_hidden_state
                loss, beta = distillation_loss(
                    hidden[batch.real], batch.expert, vocabulary, weights
                )
            (loss / len(cuts)).backward()
            losses.append(loss.item())
            overlaps.append(beta.item())
            tokens += int(batch.real.sum())
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {
            "loss": sum(losses) / len(cuts),
            "beta": sum(overlaps) / len(cuts),
            "tokens": float(tokens),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """β over drawn and agreement over greedy continuations of the held-out shards."""
        betas: list[Tensor] = []
        agreements: list[Tensor] = []
        for shard in self.dev:
            for row in range(shard.num_sequences):
                beta, agreement = self._compare(shard, row)
                if shard.temperature[row] > 0:
                    betas.append(beta)
                else:
                    agreements.append(agreement)
        return {
            "dev_beta": torch.cat(betas).mean().item(),
            "dev_agreement": torch.cat(agreements).mean().item(),
        }

    def _compare(self, shard: Shard, row: int) -> tuple[Tensor, Tensor]:
        start, end = int(shard.starts[row]), int(shard.starts[row + 1])
        ids = shard.token_ids[start:end].long()[None].to(self.options.device)
        first = int(shard.num_prompt[row]) - 1  # the state of the prompt's last token scores first
        with torch.autocast(self.options.device, torch.bfloat16):
            student = self.student.model(ids, use_cache=False).last_hidden_state[0, first:-1]
            expert = shard.hidden[start + first : end - 1].to(student.device)
            p = (expert.to(self.head.dtype) @ self.head.T).float()
            q = (student.to(self.head.dtype) @ self.head.T).float()
        same = (p.argmax(-1) == q.argmax(-1)).float()
        return overlap(p.softmax(-1), q.softmax(-1)), same

    def _log(self, values: dict[str, float]) -> None:
        self.options.out.mkdir(parents=True, exist_ok=True)
        with (self.options.out / LOG).open("a") as file:
            file.write(json.dumps({"step": self.step, "time": time.time(), **values}) + "\n")


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    trainer = Trainer(options)
    trainer.resume()
    trainer.run()

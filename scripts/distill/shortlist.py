"""`shortlist`: rank the vocabulary by the probability that the expert gives it in its own text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from scripts.distill.corpus import Shard, load_shard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--expert", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--shards", type=Path, nargs="+", required=True, help="folders of shards")
    parser.add_argument("--out", type=Path, required=True, help="JSON list of ids")
    parser.add_argument("--count", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    expert = AutoModelForCausalLM.from_pretrained(options.expert, dtype=torch.bfloat16)
    head = expert.lm_head.weight.detach()
    paths = [path for folder in options.shards for path in sorted(folder.glob("*.safetensors"))]
    shards = [load_shard(path) for path in tqdm(paths, desc="reading", unit="shard")]
    options.out.write_text(json.dumps(frequent_tokens(shards, head, options.count).tolist()) + "\n")


def frequent_tokens(shards: list[Shard], head: Tensor, count: int) -> Tensor:
    """The `count` ids with the largest total probability under the expert, largest first."""
    mass = torch.zeros(len(head))
    for shard in shards:
        # Every fourth position says as much, four times as fast.
        for hidden in shard.hidden[::4].split(512):
            mass += (hidden.to(head) @ head.T).float().softmax(-1).sum(0).cpu()
    return mass.topk(min(count, len(head))).indices

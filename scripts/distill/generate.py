"""`generate`: the expert continues training prompts; each shard is a function of (seed, index)."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from scripts.distill.corpus import save_shard, shard_path
from scripts.distill.expert import Writer
from scripts.distill.prompts import (
    Prompt,
    PromptSource,
    WidePromptSource,
    load_functions,
    load_library,
    load_problems,
)

GROUP = 8  # shards whose prompts are sorted by length together, so that little is padded
GREEDY_SHARE = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--expert", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--problems", type=Path, required=True, help="GSM8K training split, jsonl")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="evaluation prompts")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=64, help="per shard")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--wide", action="store_true", help="the expert writes most prompts too")
    parser.add_argument("--stride", type=int, default=1, help="write every n-th shard only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.expert, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(options.expert)
    writer = Writer(model.to(options.device).eval(), [tokenizer.eos_token_id, 0])
    source = prompt_source(options)
    indices = range(options.first, options.first + options.shards, options.stride)
    with tqdm(total=len(indices), desc="shards", unit="shard", smoothing=0) as bar:
        for index in indices:
            if not shard_path(options.out, index).exists():
                tokens = _write_shard(index, writer, source, tokenizer, options)
                bar.set_postfix(tokens=tokens)
            bar.update()


def prompt_source(options: argparse.Namespace) -> PromptSource:
    problems = load_problems(options.problems, options.exclude)
    if options.wide:
        return WidePromptSource(problems, load_functions(), load_library(), options.seed)
    return PromptSource(problems, load_functions(), options.seed)


def _write_shard(
    index: int,
    writer: Writer,
    source: PromptSource,
    tokenizer: PreTrainedTokenizerFast,
    options: argparse.Namespace,
) -> int:
    prompts = shard_prompts(index, source, tokenizer, options.sequences)
    rng = random.Random(f"{options.seed}/{index}")
    greedy = [rng.random() < GREEDY_SHARE and not prompt.drawn for prompt, _ in prompts]
    heat = [0.0 if cold else 1.0 for cold in greedy]
    generator = torch.Generator(options.device).manual_seed(rng.getrandbits(62))
    ids = [ids for _, ids in prompts]
    with tqdm(total=options.new_tokens, desc=f"shard {index}", leave=False) as bar:
        written = writer.write(ids, heat, options.new_tokens, generator, bar.update)
    kinds = [prompt.kind for prompt, _ in prompts]
    return save_shard(shard_path(options.out, index), written, heat, kinds)


def shard_prompts(
    index: int, source: PromptSource, tokenizer: PreTrainedTokenizerFast, count: int
) -> list[tuple[Prompt, list[int]]]:
    """The prompts of one shard, of similar length."""
    group, place = divmod(index, GROUP)
    size = GROUP * count
    prompts = [source[i] for i in range(group * size, (group + 1) * size)]
    encoded = [(prompt, encode(prompt, tokenizer)) for prompt in prompts]
    encoded.sort(key=lambda pair: len(pair[1]))
    # Shards of a group go from the outside in, so that a run that stops early has seen all lengths.
    order = sorted(range(GROUP), key=lambda i: (i * 5) % GROUP)
    start = order[place] * count
    return encoded[start : start + count]


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    if not prompt.chat:
        return list(tokenizer(prompt.text)["input_ids"])
    turn = [{"role": "user", "content": prompt.text}]
    encoded = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])

"""How well a proposer serves an expert, on continuations that the expert writes.

    python -m scripts.evaluate_pair --out pair.json humaneval.jsonl gsm8k.jsonl mmlu.jsonl

For each file of prompts the expert writes at temperature 1 and at temperature 0. At every position
of what it wrote, with p the expert's and q the proposer's distribution at temperature 1 and r a
combined one, the script sums what two of them share: overlap β = Σ min(p, q), acceptance of the
proposer's tokens Σ min(q, r) and of the expert's own Σ min(p, r).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from scripts.distill.expert import Writer, Written
from scripts.distill.losses import overlap

CHUNK = 128  # positions scored at once; a row of SmolLM2's vocabulary takes 200 kB
TIMED_PAST = 128


@dataclass(frozen=True, slots=True)
class Pair:
    expert: LlamaForCausalLM
    proposer: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class FileReport:
    """Means over the positions of one file's continuations."""

    file: str
    prompts: int
    drawn_tokens: int
    greedy_tokens: int
    overlap: float
    greedy_agreement: float
    contrastive_proposer: float
    contrastive_expert: float
    weighted_proposer: float
    weighted_expert: float
    shortlists: dict[str, dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    pair = load_pair(options)
    shortlist = json.loads(options.shortlist.read_text()) if options.shortlist else []
    reports = [evaluate_file(pair, file, shortlist, options) for file in options.files]
    times = forward_times(pair, options.timed_runs)
    result = {
        "settings": {
            name: str(value) for name, value in sorted(vars(options).items()) if name != "files"
        },
        "machine": f"{platform.machine()}, torch {torch.__version__}, {options.threads} thread(s)",
        "files": [asdict(report) for report in reports],
        "forward_ms": times,
        "parameters_read": {
            "expert": sum(p.numel() for p in pair.expert.parameters()),
            "proposer": sum(p.numel() for p in pair.proposer.parameters()),
        },
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    show(reports, times, options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help='jsonl files with a field "prompt"')
    parser.add_argument("--expert", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--proposer", type=Path, default=Path("models/smollm2-proposer"))
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--limit", type=int, default=32, help="prompts per file, evenly spread")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--mu", type=float, default=0.1, help="contrastive strength")
    parser.add_argument("--weight", type=float, default=0.5, help="the proposer's ensemble weight")
    parser.add_argument("--shortlist", type=Path, help="JSON list of ids, most frequent first")
    parser.add_argument("--sizes", type=int, nargs="*", default=[4096, 8192, 16384])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timed-runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def load_pair(options: argparse.Namespace) -> Pair:
    def load(path: Path) -> LlamaForCausalLM:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, options.dtype))
        return model.to(options.device).eval()

    return Pair(
        load(options.expert), load(options.proposer), AutoTokenizer.from_pretrained(options.expert)
    )


def read_prompts(file: Path, limit: int) -> list[str]:
    """At most `limit` prompts, evenly spread over the file."""
    prompts = [json.loads(line)["prompt"] for line in file.read_text().split("\n") if line]
    count = min(limit, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def evaluate_file(
    pair: Pair, file: Path, shortlist: list[int], options: argparse.Namespace
) -> FileReport:
    prompts = read_prompts(file, options.limit)
    ids = sorted((list(pair.tokenizer(p)["input_ids"]) for p in prompts), key=len)
    rows: list[dict[str, Tensor]] = []
    same: list[Tensor] = []
    lists = {f"{size}": torch.tensor(shortlist[:size]) for size in options.sizes if shortlist}
    for heat in (1.0, 0.0):
        written = write(pair, ids, heat, f"{file.stem} at temperature {heat:g}", options)
        for p, q in score(pair, written):
            if heat:
                rows.append(shared_mass(p, q, options.mu, options.weight, lists))
            else:
                same.append((p.argmax(-1) == q.argmax(-1)).float())
    mean = {name: torch.cat([row[name] for row in rows]).mean().item() for name in rows[0]}
    agreement = torch.cat(same)
    return FileReport(
        file=file.name,
        prompts=len(prompts),
        drawn_tokens=sum(len(row["overlap"]) for row in rows),
        greedy_tokens=len(agreement),
        overlap=mean["overlap"],
        greedy_agreement=agreement.mean().item(),
        contrastive_proposer=mean["contrastive_proposer"],
        contrastive_expert=mean["contrastive_expert"],
        weighted_proposer=mean["weighted_proposer"],
        weighted_expert=mean["weighted_expert"],
        shortlists={
            size: {name: mean[f"{name} {size}"] for name in ("mass", "overlap")} for size in lists
        },
    )


def write(
    pair: Pair, ids: list[list[int]], heat: float, label: str, options: argparse.Namespace
) -> list[Written]:
    # SmolLM2's unknown token is <|endoftext|>, which ends raw text as <|im_end|> ends a turn.
    ends = (pair.tokenizer.eos_token_id, pair.tokenizer.unk_token_id)
    stops = [token for token in ends if token is not None]
    writer = Writer(pair.expert, stops)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    written: list[Written] = []
    batches = [ids[i : i + options.batch] for i in range(0, len(ids), options.batch)]
    with tqdm(total=len(batches) * options.new_tokens, desc=label, unit="step") as bar:
        for batch in batches:
            heats = [heat] * len(batch)
            written += writer.write(batch, heats, options.new_tokens, generator, bar.update)
    return written


@torch.inference_mode()
def score(pair: Pair, written: list[Written]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of expert and proposer [positions, vocab] at what the expert wrote, in chunks."""
    for one in written:
        ids = one.token_ids[None].to(pair.proposer.device)
        first = one.num_prompt - 1  # the state of the prompt's last token scores the first new one
        states = pair.proposer.model(ids, use_cache=False).last_hidden_state[0, first:-1]
        expert_states = one.hidden[first:].to(states.device)
        for p, q in zip(expert_states.split(CHUNK), states.split(CHUNK), strict=True):
            yield pair.expert.lm_head(p).float(), pair.proposer.lm_head(q).float()


def shared_mass(
    expert: Tensor, proposer: Tensor, mu: float, weight: float, shortlists: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Logits [rows, vocab] of both at temperature 1 -> figures [rows]; q's weight is `weight`."""
    p, q = expert.softmax(-1), proposer.softmax(-1)
    contrastive = (expert - mu * proposer).softmax(-1)
    weighted = (1 - weight) * p + weight * q
    figures = {
        "overlap": overlap(p, q),
        "contrastive_proposer": overlap(q, contrastive),
        "contrastive_expert": overlap(p, contrastive),
        "weighted_proposer": overlap(q, weighted),
        "weighted_expert": overlap(p, weighted),
    }
    for size, ids in shortlists.items():
        figures[f"mass {size}"] = p[:, ids].sum(-1)
        figures[f"overlap {size}"] = overlap(p[:, ids], proposer[:, ids].softmax(-1))
    return figures


def forward_times(pair: Pair, runs: int) -> dict[str, float]:
    """Median milliseconds of a one-token forward with head, the two models taking turns."""
    models = {"expert": pair.expert, "proposer": pair.proposer}
    times: dict[str, list[float]] = {name: [] for name in models}
    past = {name: _prefill(model) for name, model in models.items()}
    for _ in range(runs):
        for name, model in models.items():
            times[name].append(_time_one(model, past[name]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | {"ratio": medians["proposer"] / medians["expert"]}


@torch.inference_mode()
def _prefill(model: LlamaForCausalLM) -> object:
    model.set_attn_implementation("sdpa")
    ids = torch.arange(TIMED_PAST, device=model.device)[None] % model.config.vocab_size
    return model(ids, use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def _time_one(model: LlamaForCausalLM, past: object) -> float:
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    started = time.perf_counter()
    model(token, past_key_values=past, use_cache=True).logits.argmax().item()
    return (time.perf_counter() - started) * 1000


def show(reports: list[FileReport], times: dict[str, float], options: argparse.Namespace) -> None:
    combined = (f"μ={options.mu:g}", f"λ={options.weight:g}")
    table = Table(title="expert continuations; acceptance against the combined distribution")
    for heading in ("file", "tokens", "β", "greedy agreement"):
        table.add_column(heading)
    for name in combined:
        table.add_column(f"{name}: proposer")
        table.add_column(f"{name}: expert")
    for r in reports:
        figures = (r.overlap, r.greedy_agreement, r.contrastive_proposer, r.contrastive_expert)
        ensemble = (r.weighted_proposer, r.weighted_expert)
        tokens = f"{r.drawn_tokens}+{r.greedy_tokens}"
        table.add_row(r.file, tokens, *(f"{value:.3f}" for value in (*figures, *ensemble)))
    console = Console()
    console.print(table)
    console.print(
        f"one token: expert {times['expert']:.1f} ms, proposer {times['proposer']:.1f} ms, "
        f"ratio {times['ratio']:.3f} ({options.dtype}, {options.threads} thread(s))"
    )


if __name__ == "__main__":
    main()

r"""Members of equal cost, where there is one small model only.

    python -m scripts.equal_members --out build/members

Ensembles of models of one size are what mixtures were made for; only one such model is at hand.
This writes **synthetic** variants of it: seeded noise on every matrix of its layers, in proportion
to the matrix's own spread, rounded to bfloat16. Nothing was trained: a variant is a somewhat worse
model that costs the same and disagrees with the original about as much as `--noise` says. What the
overlap beta = sum min(p, q) and the agreement of the greedy tokens are on real prompts is printed.

Beside the variants it writes two.yaml and three.yaml, weighted ensembles of equal weights.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from rich.console import Console
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from server.bench.prompts import BUNDLED, load_prompts

_MAX_PROMPT_TOKENS = 256


def perturb(model: PreTrainedModel, noise: float, seed: int) -> None:
    """Add noise to every matrix of the layers: `noise` times the standard deviation of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if ".layers." in name and weight.dim() == 2:
                spread = torch.randn(weight.shape, generator=generator)
                exact = weight.float() + noise * weight.float().std() * spread
                # What its file holds is what is measured here.
                weight.copy_(exact.bfloat16())


def write_variant(source: Path, out: Path, noise: float, seed: int) -> PreTrainedModel:
    """An ordinary transformers directory; returns the model in it, in float32."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    perturb(model, noise, seed)
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    for path in source.iterdir():
        if path.is_file() and "tokenizer" in path.name or path.suffix == ".jinja":
            shutil.copyfile(path, out / path.name)
    return model.float()


@torch.inference_mode()
def compare(first: PreTrainedModel, second: PreTrainedModel, texts: list[Tensor]) -> list[float]:
    """Overlap beta at temperature 1 and greedy agreement, means over all positions of `texts`."""
    overlap, agreement, count = 0.0, 0.0, 0
    for token_ids in tqdm(texts, desc="comparing", leave=False):
        p, q = (model(token_ids[None]).logits[0].softmax(-1) for model in (first, second))
        overlap += torch.minimum(p, q).sum().item()
        agreement += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += len(token_ids)
    return [overlap / count, agreement / count]


def write_config(path: Path, members: Sequence[Path]) -> None:
    """A weighted ensemble of equal weights, strategy and lengths chosen while it runs."""
    config = {
        "served_model_name": path.stem,
        "models": [{"name": member.name, "path": str(member)} for member in members],
        "combination": {"method": "weighted", "weights": [1 / len(members)] * len(members)},
        "decoding": {"strategy": "auto", "gamma": "auto"},
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Write everything, and print how alike the members are."""
    options = _parse(argv)
    out: Path = options.out
    variants = [
        (
            out / f"variant-{seed}",
            write_variant(options.model, out / f"variant-{seed}", noise, seed),
        )
        for seed, noise in enumerate([options.noise] * 2, start=1)
    ]
    directories = [directory for directory, _ in variants]
    write_config(out / "two.yaml", [directories[0], options.model])
    write_config(out / "three.yaml", [*directories, options.model])
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [
        torch.tensor(tokenizer.encode(prompt)[:_MAX_PROMPT_TOKENS])
        for name in BUNDLED
        for prompt in load_prompts(name).prompts[: options.prompts]
    ]
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    members = [(options.model.name, original), *((path.name, model) for path, model in variants)]
    console = Console()
    console.print(f"noise {options.noise}, {sum(map(len, texts))} positions of prompts")
    for i, (name, model) in enumerate(members):
        for other_name, other in members[i + 1 :]:
            beta, agreement = compare(model, other, texts)
            console.print(f"{name} and {other_name}: beta {beta:.3f}, greedy {agreement:.3f}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.equal_members")
    add = parser.add_argument
    add("--model", type=Path, default=Path("models/smollm2-135m-instruct"), help="(%(default)s)")
    add("--out", type=Path, default=Path("build/members"), help="directory (%(default)s)")
    add("--noise", type=float, default=0.1, help="of each matrix's spread (%(default)s)")
    add("--prompts", type=int, default=4, help="of each file, to compare on (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

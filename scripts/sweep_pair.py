r"""Which proposer serves an expert best: decoding speed of pairs under `cos`, by proposal length.

    python -m scripts.sweep_pair --expert models/smollm2-135m-instruct \
        --proposers four=models/four nine=models/nine:whole --prompts humaneval.jsonl gsm8k.jsonl

Every pair decodes the same prompts with `standard` and with `cos` at several lengths, one text at
a time, in one process and in turns. The figures are verified tokens per second of CPU time, of all
threads, prompts not counted; `:whole` after a directory leaves its shortlist alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from scripts.evaluate_pair import read_prompts
from server.config_file import parse_config
from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams, proposal_lengths
from server.core.sequence import Sequence
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.runner.loader import LoadedModels, load_models

WHOLE = ":whole"
CONTEXT = 640


@dataclass(slots=True)
class Tally:
    """What one pair did with one setting."""

    tokens: int = 0
    seconds: float = 0.0
    verified: int = 0
    accepted: int = 0

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds

    @property
    def acceptance(self) -> float:
        """Of the proposer's tokens that were verified."""
        return self.accepted / max(1, self.verified)


@dataclass(slots=True)
class Pair:
    """A proposer with the expert; `tallies` by proposal length, 0 for standard decoding."""

    name: str
    models: LoadedModels
    engine: Engine
    tallies: dict[int, Tally] = field(default_factory=dict)


def main(arguments: Row[str] | None = None) -> None:
    options = parse(arguments)
    pairs = [load_pair(proposer, options) for proposer in options.proposers]
    prompts = [p for file in options.prompts for p in read_prompts(file, options.limit)]
    lengths = (0, *options.gamma)
    with tqdm(total=len(prompts) * len(pairs) * len(lengths), unit="text") as bar:
        for seed, prompt in enumerate(prompts):
            for pair in pairs:
                for gamma in lengths:
                    decode(pair, prompt, gamma, seed, options)
                    bar.update()
    Console(width=100).print(table(pairs, options))


def parse(arguments: Row[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--expert", type=Path, required=True)
    parser.add_argument("--proposers", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=2, help="prompts of each file (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--gamma", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--mu", type=float, default=0.1, help="contrastive strength")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def load_pair(proposer: str, options: argparse.Namespace) -> Pair:
    name, _, path = proposer.partition("=")
    first: dict[str, object] = {"name": "proposer", "path": path.removesuffix(WHOLE)}
    if path.endswith(WHOLE):
        first["shortlist"] = None
    config = parse_config(
        {
            "served_model_name": name,
            "models": [first, {"name": "expert", "path": str(options.expert)}],
            "combination": {"method": "contrastive", "mu": options.mu},
            "engine": {"max_sequences": 1, "max_length": CONTEXT, "threads": options.threads},
        }
    )
    models = load_models(config)
    limits = EngineLimits(max_sequences=1, max_gamma=max(options.gamma))
    decoder = models.tokenizer.backend_tokenizer
    engine = Engine(models.runners, decoder, models.eos_token_ids, limits)
    return Pair(name, models, engine)


def decode(
    pair: Pair, prompt: str, gamma: int, seed: int, options: argparse.Namespace
) -> list[int]:
    """Token ids of one text, counted in the pair's tallies from its first token on."""
    combination = Combination.contrastive(2, options.mu)
    strategy, length = ("cos", gamma) if gamma else ("standard", 1)
    lengths = proposal_lengths(length, 2)
    decoding = DecodingParams(strategy, combination, lengths)  # type: ignore[arg-type]
    params = SamplingParams(
        max_tokens=options.new_tokens,
        temperature=options.temperature,
        seed=seed,
        ignore_eos=True,
    )
    ids = list(pair.models.tokenizer(prompt)["input_ids"])[-(CONTEXT - options.new_tokens) :]
    sequence = Sequence.start(f"{seed}-{gamma}", ids, params, decoding)
    pair.engine.add(sequence)
    while not sequence.num_generated:
        pair.engine.step()
    first, started = sequence.num_generated, time.process_time()
    while pair.engine.has_work:
        pair.engine.step()
    tally = pair.tallies.setdefault(gamma, Tally())
    tally.seconds += time.process_time() - started
    tally.tokens += sequence.num_generated - first
    tally.verified += sequence.stats.verified[0]
    tally.accepted += sequence.stats.accepted[0]
    return sequence.token_ids


def table(pairs: Row[Pair], options: argparse.Namespace) -> Table:
    title = f"tokens per CPU second (acceptance), temperature {options.temperature:g}"
    shown = Table(title=title, title_justify="left")
    for column in ("proposer", "standard", *(f"cos γ = {gamma}" for gamma in options.gamma)):
        shown.add_column(column)
    for pair in pairs:
        cos = (pair.tallies[gamma] for gamma in options.gamma)
        cells = (f"{tally.speed:.1f} ({tally.acceptance:.2f})" for tally in cos)
        shown.add_row(pair.name, f"{pair.tallies[0].speed:.1f}", *cells)
    return shown


if __name__ == "__main__":
    main()

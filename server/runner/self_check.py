"""Proof at load time that a model gives the same logits here as in plain transformers.

Architectures that keep state elsewhere than in keys and values, or put positions into the mask,
run without an error and give wrong logits; no list of names finds them all, a comparison does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.errors import ConfigError
from server.runner.base import Batch, Span
from server.runner.torch_runner import TorchRunner

# Largest `difference` allowed. Right ways of rounding SmolLM2-135M to bfloat16 were seen 6e-2 apart
# and 5e-2 from float32, and float16 rounds an eighth of that; what is wrong is further by far.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 0.2}
_LENGTHS = (12, 7)
_FIRST = (6, 3)  # tokens of each sequence that survive the rollback
PAGE_SIZE = 4
_TABLES = ((5, 2, 7), (1, 4))  # out of order, so that both ways of reading pages are tried
NUM_PAGES = 8


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, vocab_size: int) -> list[Tensor]:
    """Logits [length, vocab_size] of each test sequence alone, by transformers' eager attention.

    Call before a runner attaches to `model`.
    """
    model.set_attn_implementation("eager")
    logits = []
    for sequence in _sequences(vocab_size):
        ids = torch.tensor([sequence], device=model.device)
        positions = torch.arange(len(sequence), device=model.device)[None]
        output = model(input_ids=ids, position_ids=positions, use_cache=False)
        logits.append(output.logits[0, :, :vocab_size].float())
    return logits


def self_check(runner: TorchRunner, reference: list[Tensor]) -> None:
    """Compare packed prefill, a step after a rollback and single tokens with `reference`.

    Args:
        runner: over a store of at least NUM_PAGES pages of PAGE_SIZE tokens, nothing in it yet.
        reference: of `reference_logits`, computed by the same weights.

    Raises:
        ConfigError: the logits differ, are not finite, or a layer keeps no KV here.
    """
    steps = _packed_steps(runner)
    model_type = runner.model.config.model_type
    num_layers = runner.model.config.num_hidden_layers
    if runner.store.num_layers == 0:
        raise ConfigError(
            f"model {runner.name}: {model_type} does not let this server provide its attention"
        )
    worst = difference(
        torch.cat([ours for step in steps for ours in step]),
        torch.cat(
            [
                plain[rows]
                for rows_of in _step_rows()
                for plain, rows in zip(reference, rows_of, strict=True)
            ]
        ),
    )
    limit = TOLERANCE[runner.dtype]
    if not worst <= limit:  # NaN too
        raise ConfigError(
            f"model {runner.name}: {model_type} ({num_layers} layers) gives wrong logits over "
            f"paged KV: relative difference {worst:.1e} to plain transformers, limit {limit:.1e}"
        )


def difference(ours: Tensor, plain: Tensor) -> float:
    """Root mean square of `ours` - `plain` [n, vocab_size], a share of `plain`'s, in the worst row.

    What a row has in common is left out, as softmax leaves it out. Not finite where a number is
    not. Not the largest difference of single logits: of a million, one is always far out.
    """
    expected, errors = plain.float(), ours.float() - plain.float()
    scale = expected.var(1, correction=0).clamp(min=torch.finfo(torch.float32).tiny)
    return float((errors.var(1, correction=0) / scale).max().sqrt())


def _sequences(vocab_size: int) -> list[list[int]]:
    """Fixed, spread over the vocabulary."""
    return [
        [(7919 * (number + 1) + 104729 * position) % vocab_size for position in range(length)]
        for number, length in enumerate(_LENGTHS)
    ]


def _step_rows() -> list[list[slice]]:
    """Rows of the reference that each step of `_packed_steps` recomputes, by sequence."""
    return [
        [slice(0, first) for first in _FIRST],
        [slice(first, length - 1) for first, length in zip(_FIRST, _LENGTHS, strict=True)],
        [slice(length - 1, length) for length in _LENGTHS],
    ]


def _packed_steps(runner: TorchRunner) -> list[list[Tensor]]:
    """Prefill with two wrong tokens at the end, go on without them, then one token each."""
    sequences = _sequences(runner.vocab_size)
    steps = []
    for number, rows_of in enumerate(_step_rows()):
        wrong = 2 if number == 0 else 0
        spans = tuple(
            Span(
                pages=table,
                num_past=rows.start,
                token_ids=[*sequence[rows], *sequence[:wrong]],
                num_kept=rows.stop - rows.start + wrong,
            )
            for table, sequence, rows in zip(_TABLES, sequences, rows_of, strict=True)
        )
        logits = runner.forward(Batch(spans)).float().split([span.num_kept for span in spans])
        steps.append([rows[: len(rows) - wrong] for rows in logits])
    return steps

"""The law of standard collaborative decoding by enumeration, in float64 numpy, written apart from
the product's tensor code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from server.core.combination import Combination
from server.core.sampling_params import SamplingParams
from tests.support.table_lm import TableLM

Floats = NDArray[np.float64]
Law = dict[tuple[int, ...], float]

Z_LIMIT = 4.5  # of `chi_square_z`: one comparison in 300,000 is larger where the law holds
# What "assert z < Z_LIMIT" says where it fails. A test of a wrong law looks for this, or an error
# that cuts texts short would do.
WRONG_LAW = r"^assert \S+ < "


def softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    probs: Floats = weights / weights.sum()
    return probs


def forbidden(vocab_size: int, params: SamplingParams, made: Sequence[int]) -> list[int]:
    """Tokens that lists of tokens and words leave out."""
    completed = [w[-1] for w in params.bad_words if [*made][len(made) - len(w) + 1 :] == [*w[:-1]]]
    if params.allowed_token_ids is None:
        return completed
    return completed + [t for t in range(vocab_size) if t not in params.allowed_token_ids]


def warped(
    logits: Floats, params: SamplingParams, prompt: Sequence[int], made: Sequence[int]
) -> Floats:
    """Penalties, bias, temperature, min-p, top-k, top-p, in plain loops."""
    logits = logits.copy()
    for token in range(len(logits)):
        count = list(made).count(token)
        if params.repetition_penalty != 1 and (count or token in prompt):
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        logits[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    for token, bias in params.logit_bias:
        logits[token] += bias
    logits[forbidden(len(logits), params, made)] = -np.inf
    if params.is_greedy:
        return logits
    logits = logits / params.temperature
    probs = softmax(logits)
    logits[probs < params.min_p * probs.max() * (1 - 1e-9)] = -np.inf
    order = np.argsort(-logits)
    if params.top_k:
        logits[order[params.top_k :]] = -np.inf
    probs, mass = softmax(logits), 0.0
    for token in order:
        if mass >= params.top_p:
            logits[token] = -np.inf
        mass += probs[token]
    return logits


def target(
    lms: Sequence[TableLM],
    combination: Combination,
    params: SamplingParams,
    prompt: Sequence[int],
    made: Sequence[int],
) -> Floats:
    """r after prompt + made, [vocab_size]."""
    raw = [lm.logits([*prompt, *made]) for lm in lms]
    if combination.method == "weighted":
        parts = [softmax(warped(row, params, prompt, made)) for row in raw]
        r: Floats = np.sum([w * p for w, p in zip(combination.weights, parts, strict=True)], axis=0)
    else:
        with np.errstate(invalid="ignore"):
            mix = np.sum(
                [
                    w * (np.maximum(row, -1e4) if w < 0 else row)
                    for w, row in zip(combination.weights, raw, strict=True)
                    if w != 0
                ],
                axis=0,
            )
        if combination.plausibility:
            p = softmax(raw[combination.reference])
            p[forbidden(len(p), params, made)] = 0
            mix = np.where(p < combination.plausibility * p.max(), -np.inf, mix)
        r = softmax(warped(mix, params, prompt, made))
    if params.is_greedy:
        one_hot: Floats = np.eye(len(r))[int(np.argmax(r))]
        return one_hot
    return r


def exact_law(
    lms: Sequence[TableLM],
    combination: Combination,
    params: SamplingParams,
    prompt: Sequence[int],
    eos: frozenset[int] = frozenset(),
) -> Law:
    """Probability of every continuation of max_tokens tokens, or shorter where EOS ends it."""
    law: Law = {}
    front: Law = {(): 1.0}
    while front:
        made, mass = front.popitem()
        r = target(lms, combination, params, prompt, made)
        for token, probability in enumerate(r):
            if probability <= 0:
                continue
            longer = (*made, token)
            done = len(longer) == params.max_tokens or token in eos
            (law if done else front)[longer] = mass * float(probability)
    return law


def chi_square_z(samples: Sequence[tuple[int, ...]], law: Law) -> float:
    """Standard normal deviate of the chi-square fit; large is bad.

    Cells expected less than five times are merged. No sample may be one that the law excludes.
    """
    counts = Counter(samples)
    assert counts.keys() <= law.keys(), f"impossible: {counts.keys() - law.keys()}"
    observed: list[float] = []
    expected: list[float] = []
    rare_observed = rare_expected = 0.0
    for cell, probability in law.items():
        mean = probability * len(samples)
        if mean < 5:
            rare_observed += counts[cell]
            rare_expected += mean
        else:
            observed.append(counts[cell])
            expected.append(mean)
    if rare_expected > 0:
        observed.append(rare_observed)
        expected.append(rare_expected)
    if len(observed) < 2:
        return 0.0
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    return float(stats.norm.isf(stats.chi2.sf(statistic, len(observed) - 1)))

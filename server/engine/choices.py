"""What requests leave open, spelt out."""

from __future__ import annotations

from dataclasses import replace

from server.core.sampling_params import DecodingParams

_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # proposal lengths of the first model that are tried
_BONUS_LENGTHS = (1, 2, 4)  # and of the others


def make_choices(decoding: DecodingParams, max_gamma: int) -> tuple[DecodingParams, ...]:
    """What `decoding` leaves open, spelt out; standard first where it is among them."""
    num_models = len(decoding.combination.weights)
    plain = replace(decoding, strategy="standard", is_gamma_auto=False, shared_coins=False)
    firsts = [length for length in _LENGTHS if length <= max_gamma]
    others = [length for length in _BONUS_LENGTHS if length <= max_gamma]
    if not decoding.is_gamma_auto:
        lengths = [decoding.gamma]
    else:
        lengths = [(first, *[other] * (num_models - 1)) for first in firsts for other in others]
    choices: list[DecodingParams] = []
    if decoding.strategy == "auto":
        choices.append(plain)
        if decoding.shared_coins:
            choices.append(
                replace(plain, strategy="mixture", kappa=0, shared_coins=True, lookup=None)
            )
    if num_models > 1 and decoding.strategy in ("auto", "cos"):
        choices += [replace(plain, strategy="cos", gamma=gamma) for gamma in lengths]
        if decoding.is_gamma_auto:
            # The first model never proposes: it scores what the others do, many tokens at once.
            silent = [(0, *[length] * (num_models - 1)) for length in firsts if length > 1]
            choices += [replace(plain, strategy="cos", gamma=gamma) for gamma in silent]
    if num_models > 1 and decoding.strategy in ("auto", "speculative"):
        unique = dict.fromkeys((gamma[0], *[1] * (num_models - 1)) for gamma in lengths)
        choices += [replace(plain, strategy="speculative", gamma=gamma) for gamma in unique]
    return tuple(choices) or (plain,)

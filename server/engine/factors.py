"""Factors of seconds that are only ever seen as products: a Kalman filter over their logarithms.

A step that took longer than expected says nothing of which factor is to blame. The filter keeps
what is known of sums of them as well as of each: two kinds of steps that share a factor and take
turns tell what the one takes beside the other, however fast the machine is meanwhile. Between
observations every factor drifts, back to what it was at first if it is not seen for long (an
Ornstein-Uhlenbeck process).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence as Row

import numpy as np
from numpy.typing import NDArray

_TICK = 0.1  # seconds, in which nothing drifts to speak of


class Factors:
    """Named factors, 1 at first; all variances are of logarithms."""

    def __init__(self, noise: float, surprise: float) -> None:
        """Make one without factors.

        Args:
            noise: variance of one observation.
            surprise: standard deviations that one observation counts for at most.
        """
        self._noise = noise
        self._surprise = surprise
        self._passed = 0.0  # seconds that still wait
        self._index: dict[Hashable, int] = {}
        self._memories: NDArray[np.float64] = np.zeros(0)
        self._priors: NDArray[np.float64] = np.zeros(0)
        self._means: NDArray[np.float64] = np.zeros(0)
        self._covariance: NDArray[np.float64] = np.zeros((0, 0))
        self._own: NDArray[np.float64] = np.zeros(0)  # variances, as if the others were known

    def add(self, name: Hashable, prior: float, variance: float, memory: float) -> None:
        """Know a factor from now on, if it is new.

        Args:
            name: of the factor.
            prior: its variance when it was not seen for long.
            variance: the same now.
            memory: seconds after which it has lost 63 % of what was learnt, if it is not seen.
        """
        if name in self._index:
            return
        size = len(self._index)
        self._index[name] = size
        self._memories = np.append(self._memories, memory)
        self._priors = np.append(self._priors, prior)
        self._means = np.append(self._means, 0.0)
        covariance = np.zeros((size + 1, size + 1))
        covariance[:size, :size] = self._covariance
        covariance[size, size] = variance
        self._covariance = covariance
        self._own = np.append(self._own, variance)

    def value(self, names: Row[Hashable]) -> float:
        """Their product; of those that nobody has added, 1."""
        index, means = self._index, self._means
        return math.exp(sum([means[index[name]] for name in names if name in index]))

    def doubt(self, name: Hashable) -> float:
        """Standard deviation of a factor by the observations it was last in, if it was added.

        What these leave to the other factors does not count, nor do observations in which another
        one came last: this says how lately a kind of steps was seen, and how often.
        """
        return math.sqrt(self._own[self._index[name]])

    def pass_time(self, seconds: float) -> None:
        """Nothing was seen for so long; what is less than _TICK waits for more."""
        self._passed += seconds
        if self._passed < _TICK:
            return
        kept = np.exp(-self._passed / self._memories)
        self._passed = 0.0
        self._means *= kept
        self._covariance *= np.outer(kept, kept)
        drift = self._priors * (1 - kept**2)
        self._covariance.flat[:: len(drift) + 1] += drift
        self._own = self._own * kept**2 + drift

    def observe(self, names: Row[Hashable], measured: float) -> None:
        """The product of `names`, all added, was seen to be `measured`, above 0."""
        chosen = [self._index[name] for name in names]
        shared = self._covariance[:, chosen].sum(axis=1)
        total = float(shared[chosen].sum()) + self._noise
        limit = self._surprise * math.sqrt(total)
        surprise = math.log(measured) - float(self._means[chosen].sum())
        surprise = min(limit, max(-limit, surprise))
        self._means += shared * (surprise / total)
        self._covariance -= np.outer(shared, shared) / total
        last = chosen[-1]
        self._own[last] *= self._noise / (self._noise + self._own[last])

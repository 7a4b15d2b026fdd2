"""Buckets of histograms, wide enough for CPU and GPU.

The last of SECONDS is the default of `http.request_seconds`: what takes longer is ended.
"""

from __future__ import annotations

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

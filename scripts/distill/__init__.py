"""Distils a small proposer from the expert: prompts -> expert continuations -> training."""

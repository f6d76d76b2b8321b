"""Layers with bitsandbytes' names and arguments."""

from bnbops.nn.embedding import Embedding, StableEmbedding

__all__ = ["Embedding", "StableEmbedding"]

"""Layers whose weight is quantized, and embeddings whose optimizer states are not."""

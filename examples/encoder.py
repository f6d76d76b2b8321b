"""A BERT that turns sentences into vectors (all-MiniLM-L6-v2), in torch's modules, named as in its weights' file."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embeddings(nn.Module):
    """Token ids [batch, time] to the sum of word, position and type embeddings, normalised."""

    def __init__(self, vocabulary: int, width: int, positions: int, types: int, eps: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(types, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.register_buffer("position_ids", torch.arange(positions)[None])

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.position_embeddings(self.position_ids[:, : tokens.shape[1]])
        types = self.token_type_embeddings(torch.zeros_like(tokens))  # all of one sentence
        return self.LayerNorm(self.word_embeddings(tokens) + positions + types)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        projections = self.query, self.key, self.value
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projections)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)


class Output(nn.Module):
    """Projects and adds to the residual stream, which is normalised afterwards."""

    def __init__(self, inner: int, width: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, eps: float) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(width, heads), "output": Output(width, width, eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = Output(inner, width, eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class SentenceEncoder(nn.Module):
    """Maps token ids and a mask that is False for padding, [batch, time] each, to unit vectors [batch, width].

    The mean over a sentence's tokens, as Reimers & Gurevych, "Sentence-BERT" (arXiv:1908.10084), section 3.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.embeddings = Embeddings(
            config["vocab_size"], width, config["max_position_embeddings"], config["type_vocab_size"], eps
        )
        heads, inner = config["num_attention_heads"], config["intermediate_size"]
        layers = (Layer(width, heads, inner, eps) for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})  # in the file, but sentence vectors do without

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        for layer in self.encoder["layer"]:
            x = layer(x, mask[:, None, None, :])
        weight = mask[..., None].to(x.dtype)
        return F.normalize((x * weight).sum(1) / weight.sum(1))

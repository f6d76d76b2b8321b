"""A small GPT: pre-norm transformer blocks, learned positions, the output head tied to the embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats per token, computed in fp32 whatever the model's dtype."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Block(nn.Module):
    """Causal self-attention and an MLP, each on a normalised copy of the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attention_out(mixed.transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nn.Module):
    """Maps tokens [batch, time], int64, time <= block_size, to logits of the next ones [batch, time, vocabulary]."""

    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: normal weights, and 1/sqrt(2 * layers) of that where a block writes to the residual stream."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                writes_residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * len(self.blocks)) ** 0.5 if writes_residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token_embedding.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(self(tokens), targets)

    @torch.no_grad()
    def generate(self, prompt: Tensor, length: int, temperature: float, generator: torch.Generator) -> Tensor:
        """The prompt, int64 [time], and `length` sampled tokens."""
        tokens = prompt
        for _ in range(length):
            logits = self(tokens[None, -self.block_size :])[0, -1].float()
            choice = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
            tokens = torch.cat([tokens, choice])
        return tokens

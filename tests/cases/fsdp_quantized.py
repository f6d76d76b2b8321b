"""A small model with adapters on quantized layers, its training on one process and on several, and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import bnbops
from bnbops.nn import Embedding4bit, Linear4bit, plain_state_dict, quantize_
from cases.sharded import whole

WORDS, WIDTH, HIDDEN, LABELS = 33, 128, 65, 5  # 65 rows on 2 or 4 ranks are uneven, and of 5 on 4 one has none
FORMATS = {
    "nf4": {"quant": "nf4"},  # with nested scales
    "fp4": {"quant": "fp4", "double_quant": False},
    "int8": {"quant": "int8", "threshold": 2.0},
}


class LoRA(nn.Module):
    """A frozen layer and two trained factors beside it; of rank 2, so that some of 4 ranks hold no row of `down`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.into = nn.Linear(WIDTH, hidden)
        self.out = nn.Linear(hidden, WIDTH)  # 65 columns: flat blocks

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.gelu(self.into(self.norm(x))))


class Net(nn.Module):
    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))
        self.head = nn.Linear(WIDTH, LABELS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Tied(nn.Module):
    """An embedding whose table is the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = Embedding4bit(WORDS, WIDTH, quant_type="nf4")
        self.head = Linear4bit(WIDTH, WORDS, bias=False, quant_type="nf4", compress_statistics=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens))


def quantized(name: str = "nf4", seed: int = 0, hidden: int = HIDDEN) -> Net:
    torch.manual_seed(seed)
    return quantize_(Net(hidden), **FORMATS[name], embeddings=True, progress=False)


def with_adapters(model: Net) -> Net:
    """Frozen but for adapters on all linear layers, and the norms."""
    torch.manual_seed(7)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            module.requires_grad_(False)
            model.set_submodule(name, LoRA(module))
    return model


def mesh_of(*sizes: int) -> DeviceMesh:
    """Of all ranks; two sizes replicate over the first."""
    sizes = sizes or (dist.get_world_size(),)
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])


def shard(model: nn.Module, **options: object) -> nn.Module:
    """Block by block."""
    options = {"mesh": mesh_of()} | options
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(WORDS, (6, 3), generator=generator), torch.randint(LABELS, (6, 3), generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], step: int, rank: int) -> Tensor:
    tokens, labels = batch(step, rank)
    return F.cross_entropy(model(tokens).float().flatten(0, 1), labels.flatten())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    group = {"params": trained, "min_8bit_vector_size": 10**6}  # shards would cut blocks of the vectors
    return bnbops.optim.AdamW8bit([group], lr=1e-2, min_8bit_size=128)


def train(model: nn.Module, ranks: Iterable[int], steps: int = 3) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses, and in the end all tensors of the model and of the optimizer, whole.

    `ranks`: whose batches this process computes; their gradients are averaged. On several processes each computes one,
    and the wrapper of the model averages.
    """
    optimizer, losses, ranks = optimizer_of(model), [], list(ranks)
    for step in range(steps):
        losses.append(torch.stack([backward(loss_of(model, step, rank)) for rank in ranks]))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(len(ranks))
        optimizer.step()
        optimizer.zero_grad()
    states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    tensors = {f"state {i} {name}": whole(x) for i, state in enumerate(states) for name, x in state.items()}
    assert any(x.dtype == torch.uint8 for x in tensors.values())
    return losses, tensors | whole_tensors(model)


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor).clone() for name, tensor in plain_state_dict(model).items()}

"""Models to quantize, and what a test asks of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import bnbops
from bnbops.nn import Linear4bit, Linear8bitLt

FORMATS = ["nf4", "fp4", "int4", "int8"]


def named(value: Any) -> str:
    """The name of a test's case: the same in every process, which a function's address is not."""
    return getattr(value, "__name__", str(value))


def quantize_(model: nn.Module, *args, **kwargs) -> nn.Module:
    return bnbops.nn.quantize_(model, *args, progress=False, **kwargs)


class Net(nn.Module):
    """Linear layers with and without bias, an embedding, a head, a norm and a buffer."""

    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 64, dtype=dtype)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 96, dtype=dtype), nn.GELU(), nn.Linear(96, 64, bias=False, dtype=dtype))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(64, dtype=dtype)
        self.lm_head = nn.Linear(64, 20, bias=False, dtype=dtype)
        self.register_buffer("scale", torch.tensor([1.5], dtype=dtype))
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(self.norm(x))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 48, 64) / 8)
        self.down = nn.Parameter(torch.randn(4, 64, 48) / 8)
        self.bias = nn.Parameter(torch.randn(4, 48))
        self.position = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bk,enk->ben", self.position(x), self.up) + self.bias
        return torch.einsum("ben,ekn->bk", hidden, self.down)


TOKENS = torch.arange(20).view(2, 10)
LINEARS = [f"layers.{layer}.{index}" for layer in (0, 1) for index in (0, 2)]


def net(seed: int = 0, **kwargs) -> Net:
    torch.manual_seed(seed)
    return Net(**kwargs)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def snapshot(model: nn.Module) -> dict[str, object]:
    """Every module by identity, every tensor by identity and value."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    kept = {
        name: (id(tensor), None if tensor.is_meta else tensor.detach().clone().flatten()) for name, tensor in tensors
    }
    return kept | {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, value in after.items():
        if not isinstance(value, tuple):
            assert value == before[name], name
            continue
        assert value[0] == before[name][0], name
        assert value[1] is None or torch.equal(value[1].view(torch.uint8), before[name][1].view(torch.uint8)), name


def by_hand(linear: nn.Linear, quant: str) -> nn.Linear:
    """A quantized layer, made as bitsandbytes' users make it."""
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    if quant == "int8":
        layer = Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
    else:
        layer = Linear4bit(*sizes, compress_statistics=True, quant_type=quant)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def experts(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), Experts())

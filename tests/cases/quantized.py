"""Quantized layers of every kind, and inputs, that the tests of compiling and exporting share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import bnbops
from bnbops.functional import quantize_4bit
from bnbops.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt

IN, OUT, TOKENS = 64, 48, 30


class Experts(nn.Module):
    """Linear layers of 4 bits, one for each third of the rows."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        packed, state = quantize_4bit(torch.randn(3, OUT, IN), compress_statistics=nested, quant_type="nf4")
        self.register_buffer("packed", packed)
        self.absmax, self.shape, self.nested = state.absmax, list(state.shape), {}
        if nested:
            second = state.state2
            self.nested = {"nested_absmax": second.absmax, "nested_code": second.code, "nested_offset": state.offset}
        self.bias = nn.Parameter(torch.randn(3, OUT))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        ends = torch.stack([torch.full((), end, dtype=torch.int32) for end in (rows // 3, 2 * rows // 3, rows)])
        bias = self.bias.to(x.dtype)
        return torch.ops.bnbops.grouped_linear_4bit(
            x, self.packed, self.absmax, bias, ends, self.shape, 64, "nf4", **self.nested
        )


class Expert(nn.Module):
    """An expert's weight that is a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUT, IN))
        bnbops.nn.parametrize.replace_parameter_4bit(self, "weight", compress_statistics=True)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t().to(x.dtype)


LINEARS: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: Linear4bit(IN, OUT, compress_statistics=False, quant_type="nf4"),
    "nf4 nested": lambda: Linear4bit(IN, OUT, quant_type="nf4"),
    "fp4": lambda: Linear4bit(IN, OUT, compress_statistics=False, quant_type="fp4"),
    "fp4 nested": lambda: Linear4bit(IN, OUT, quant_type="fp4"),
    "blocks that straddle rows": lambda: Linear4bit(IN, OUT, quant_type="nf4", blocksize=256),
    "bytes in bfloat16": lambda: Linear4bit(IN, OUT, quant_type="nf4", quant_storage=torch.bfloat16),
    "compute_dtype": lambda: Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=torch.float16),
    "int8": lambda: Linear8bitLt(IN, OUT, has_fp16_weights=False),
    "int8 with outliers": lambda: Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=6.0),
    "int8 of a float weight": lambda: Linear8bitLt(IN, OUT, threshold=6.0),
    "experts": lambda: Experts(nested=False),
    "experts nested": lambda: Experts(nested=True),
    "parametrized": Expert,
}
EMBEDDINGS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "nf4": lambda dtype: Embedding4bit(TOKENS, IN, dtype=dtype, quant_type="nf4"),
    "fp4 nested": lambda dtype: Embedding4bit(TOKENS, IN, dtype=dtype, compress_statistics=True),
    "int8": lambda dtype: Embedding8bit(TOKENS, IN, dtype=dtype),
}


def quantized(make: Callable[..., nn.Module], *args: object) -> nn.Module:
    torch.manual_seed(0)
    return make(*args).to("cpu")


def features(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Two columns hold outliers beyond 6."""
    x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows))
    x[:, [3, 40]] *= 9
    return x.to(dtype)


def gradients(module: nn.Module, call: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    """The output and the gradients of the input and of each parameter that trains."""
    x = x.clone().requires_grad_(x.is_floating_point())
    module.zero_grad()
    out = call(x)
    if out.requires_grad:
        out.float().square().sum().backward()
    leaves = ([x] if x.requires_grad else []) + [p for p in module.parameters() if p.requires_grad]
    return [out.detach(), *(leaf.grad for leaf in leaves)]

"""Quantized layers and comparisons that the tests of the 4-bit layers share."""

import torch
from torch import Tensor, nn

from bnbops.nn import Embedding4bit, Linear4bit

STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
IN, OUT = 128, 96  # two blocks a row
ROWS, DIM = 40, 64


def linear(quantized: bool = True, size: tuple[int, int] = (IN, OUT), seed: int = 0, **options) -> Linear4bit:
    torch.manual_seed(seed)
    layer = Linear4bit(*size, **{"quant_type": "nf4"} | options)
    return layer.to("cpu") if quantized else layer


def embedding(quantized: bool = True, size: tuple[int, int] = (ROWS, DIM), seed: int = 0, **options) -> Embedding4bit:
    torch.manual_seed(seed)
    layer = Embedding4bit(*size, **{"quant_type": "nf4"} | options)
    return layer.to("cpu") if quantized else layer


def inputs(rows: int = 5, size: int = IN, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def raw(tensor: Tensor) -> Tensor:
    """Its bytes: codes that are stored as floats may be NaN."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def differing(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Keys whose tensors differ in dtype, shape or bytes, or that only one of both has."""

    def same(a: Tensor, b: Tensor) -> bool:
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))

    keys = actual.keys() | expected.keys()
    return sorted(k for k in keys if k not in actual or k not in expected or not same(actual[k], expected[k]))


def copies(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in state_dict.items()}


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What the module registers."""
    return dict(module.named_parameters()) | dict(module.named_buffers())

"""Int8 inputs that several test files use."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import bnbops  # noqa: F401

ops = torch.ops.bnbops
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def codes(*shape: int, seed: int = 0) -> Tensor:
    """All 256 of them, -128 too, which quantization never gives."""
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def activations(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, outliers: int = 0) -> Tensor:
    """Normal values over two decades; so many columns have outliers beyond 6 in some rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** (-2 * torch.rand(shape, generator=generator))
    if outliers:
        columns = torch.randperm(shape[-1], generator=generator)[:outliers]
        x[..., ::2, columns] = x[..., ::2, columns].sign() * (6.5 + x[..., ::2, columns].abs())
    return x.to(dtype)


def scales(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.5


def equal(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.equal(actual, expected)


def assert_within(actual: Tensor, expected: Tensor, error: Tensor) -> None:
    """Within `error` of `expected` (both float64), everywhere."""
    worst = ((actual.double() - expected).abs() - error).amax() if actual.numel() else torch.tensor(0.0)
    assert actual.shape == expected.shape and worst <= 0, f"off by {worst:.3g} more than rounding explains"


def items() -> Iterator[tuple[str, list[Tensor]]]:
    """For test_isa.py: results that must have the same bits on every instruction set."""
    for dtype in DTYPES:
        x = activations(37, 1037, dtype=dtype, outliers=9)
        x[3, 5], x[4, 6], x[5, 7], x[6] = math.nan, math.inf, -math.inf, 0.0
        x[7], x[8, :9] = 1e-41, 1e-39
        for threshold in (0.0, 0.1, 6.0):
            yield f"int8_double_quant {dtype} {threshold}", list(ops.int8_double_quant(x, threshold))
        # every way to multiply: few rows, tiles of rows and what is left, several depths
        for rows in (1, 2, 3, 4, 5, 6, 11, 16, 17, 31, 32, 37):
            for threshold in (0.0, 6.0):
                y = ops.linear_int8(x[:rows], codes(131, 1037), scales(131), scales(131).to(dtype), threshold)
                yield f"linear_int8 {dtype} {rows} {threshold}", [y]
        sums = ops.int8_linear_matmul(codes(300, 200), codes(70, 200, seed=1))
        values = ops.int8_mm_dequant(sums, scales(300), scales(70), dtype, scales(70))
        yield f"int8_mm_dequant {dtype}", [sums, values, ops.int8_vectorwise_dequant(codes(9, 300), scales(9))]

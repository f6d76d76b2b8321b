"""squared_norms against plain sums (reference/norms.py)."""

import math

import pytest
import torch
from torch import Tensor

from cases.backends import on_every_backend
from cases.rules import DTYPES
from reference import norms

MAX = torch.finfo(torch.float32).max
SHAPES = [(64, 64), (5, 257), (1, 513), (2, 1), (17, 512), (4, 3, 5, 7), (300,), (1,), (), (0,), (3, 0), (9, 70_001)]


def assert_sums(actual: Tensor, expected: list[float], errors: list[float], counts: list[int]) -> None:
    """Sums of `count` non-negative terms that are known to within `error`, added up in float64 in some order."""
    assert actual.dtype == torch.float64 and actual.shape == (len(expected),)
    for x, y, error, count in zip(actual.tolist(), expected, errors, counts, strict=True):
        assert abs(x - y) <= error + count * 2**-53 * y, (x, y)


def check_squared_norms(tensors: list[Tensor]) -> None:
    actual = torch.ops.bnbops.squared_norms(tensors)
    expected = [norms.squared_norm(x) for x in tensors]  # squares of fp32 are exact in float64
    assert_sums(actual, expected, [0.0] * len(tensors), [x.numel() for x in tensors])


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Over many decades."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    return (torch.randn(shape, generator=generator) * 10 ** (-4 * torch.rand(shape, generator=generator))).to(dtype)


# ---- squared_norms ---------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_norms_are_sums_of_squares(dtype):
    tensors = [values(*shape, dtype=dtype) for shape in SHAPES]
    before = [x.clone() for x in tensors]
    check_squared_norms(tensors)
    assert all(torch.equal(x, y) for x, y in zip(before, tensors, strict=True))


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_norms_of_every_small_size(dtype):
    """Each inside a larger buffer of large values: reading one element too many would show."""
    buffer = torch.full((3000,), 1e4, dtype=dtype)
    tensors = []
    for offset, size in enumerate([*range(140), *range(250, 262), *range(1020, 1030), *range(2040, 2052)]):
        start = offset % 67
        x = buffer.clone()[start : start + size]
        tensors.append(x.copy_(values(size)))
    check_squared_norms(tensors)


@on_every_backend
def test_squared_norms_of_mixed_dtypes_and_strides():
    x = values(30, 40)
    tensors = [x, x.bfloat16(), x.half(), x.t(), x[:, ::3], x[3].expand(7, 40), x.flip(0), x.view(2, 15, 40)[:, 3]]
    check_squared_norms(tensors)


@on_every_backend
@pytest.mark.parametrize("count", [1, 2, 500])
def test_squared_norms_of_any_number_of_tensors(count):
    check_squared_norms([values(i % 40, 1 + i % 7) for i in range(count)])


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_elements_do_not_count(dtype):
    x = values(3, 1000, dtype=dtype)
    for start, value in enumerate((math.nan, math.inf, -math.inf)):
        x.view(-1)[start::7] = value
    check_squared_norms([x, torch.full((100,), math.nan, dtype=dtype), values(50, dtype=dtype)])


@on_every_backend
def test_squares_beyond_fp32_are_summed():
    x = torch.tensor([MAX, -MAX, 1e-30, 1e-45, -1e-45, 0.0, -0.0])
    check_squared_norms([x, x[2:], x[3:], x[5:], torch.full((5000,), MAX)])


def test_one_tensor_has_the_same_bits_alone():
    """And for any number of threads, and strided."""
    tensors = [values(*shape) for shape in [(3, 100_000), (5, 7), (1000, 301), (4096,)]]
    expected = torch.ops.bnbops.squared_norms(tensors)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(torch.ops.bnbops.squared_norms(tensors), expected)
    for x, norm in zip(tensors, expected, strict=True):
        strided = x.repeat_interleave(2, dim=-1)[..., ::2]
        assert torch.equal(torch.ops.bnbops.squared_norms([strided]), norm[None])


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.complex64], ids=str)
def test_squared_norms_refuses_other_dtypes(dtype):
    message = r"bnbops::squared_norms: tensors\[1\] must be float32, bfloat16 or float16"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bnbops.squared_norms([torch.ones(3), torch.ones(3).to(dtype)])

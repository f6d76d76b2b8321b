"""CUDA kernels of products with 4-bit weights: each kernel, its tails, and what a device cannot check."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from cases import backends
from cases.quantize_4bit import some_sizes, types
from cases.weights_4bit import DTYPES, Weight, assert_equal, normal, offsets_of, ops
from reference import quantize_4bit as ref

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _simulated():
    with backends.use("cuda_on_cpu"):
        yield


def check(weight: Weight, rows: int, dtype: torch.dtype) -> None:
    out_features, in_features = weight.described[0]
    x, bias = normal(rows, in_features, seed=1, dtype=dtype), normal(out_features, seed=2, dtype=dtype)
    actual = weight.linear(x, bias)
    ref.assert_product(actual, x, weight.values, bias)
    assert_equal(actual, weight.linear(x, bias))  # the same bits every time


# ---- rows, and the kernels that they choose --------------------------------------------------------------------


# Up to 8, 16, 32 and 64 rows have tensor cores' kernels of their own; more are for torch's product.
@pytest.mark.parametrize("rows", [*range(1, 10), 16, 17, 32, 33, 63, 64, 65, 129])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 96), (37, 192), (131, 128)], ids=str)
def test_rows(rows, dtype, shape):
    """Features in short and in long segments, and enough of them for two tiles of each thread block."""
    check(Weight(*shape, nested=rows % 2 == 0), rows, dtype)


# Features that are a part of a warp's or a thread block's share, or several; in units of 32 for tensor cores.
@pytest.mark.parametrize("in_features", [32, 64, 96, 512, 544, 1056, 2112, 1, 2, 7, 8, 9, 31, 63, 65, 2049, 4104])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features(in_features, dtype):
    for out_features, rows in ((1, 1), (5, 3), (17, 8), (33, 12)):
        check(Weight(out_features, in_features, quant_type="fp4" if rows == 3 else "nf4"), rows, dtype)


@some_sizes
@pytest.mark.parametrize("nested", [False, True])
def test_blocks_of_any_size(blocksize, quant_type, nested):
    """Smaller than what a warp takes at a time, within a row, and across rows, which may begin anywhere in a block."""
    for in_features, dtype in itertools.product((64, 96, 160, 99), DTYPES):
        check(Weight(19, in_features, blocksize=blocksize, quant_type=quant_type, nested=nested), 4, dtype)


# ---- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(19, 96), (19, 99)], ids=str)
def test_misaligned_activations_change_no_bit(guard, dtype, shape):
    weight, bias = Weight(*shape), guard(normal(shape[0], seed=2, dtype=dtype))
    for rows in (3, 20):
        x = normal(rows, shape[1], seed=1, dtype=dtype)
        assert_equal(weight.linear(guard(x), bias), weight.linear(x, bias))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@types
def test_both_kernels_agree(dtype, quant_type):
    """A weight whose codes lie askew is for the ordinary cores."""
    weight, odd = Weight(40, 320, quant_type=quant_type), Weight(40, 320, quant_type=quant_type)
    odd.packed = torch.cat([torch.zeros(1, 1, dtype=torch.uint8), weight.packed])[1:]
    assert odd.packed.data_ptr() % 4 == 1
    x = normal(8, 320, seed=1, dtype=dtype)
    by_tensor_cores, by_others = weight.linear(x), odd.linear(x)
    if quant_type == "nf4":  # whose values tensor cores round; else this would compare one kernel with itself
        assert not torch.equal(by_tensor_cores, by_others)
    allowed = 2 * torch.finfo(dtype).eps * (x.double().abs() @ weight.values.double().abs().t())
    assert ((by_tensor_cores.double() - by_others.double()).abs() <= allowed).all()


def test_codes_aligned_to_4_bytes():
    """... are for tensor cores, if not by loads of 8 bytes: those add in another order."""
    weight, shifted = Weight(20, 256), Weight(20, 256)
    shifted.packed = torch.cat([torch.zeros(4, 1, dtype=torch.uint8), weight.packed])[4:]
    assert shifted.packed.data_ptr() % 8 == 4
    for rows in (2, 40):
        check(shifted, rows, torch.bfloat16)


# ---- experts ---------------------------------------------------------------------------------------------------


def experts_of(ends: list[int], tokens: int) -> list[slice]:
    """What the kernels make of any ends: an end counts no more than the largest before it, nor more than the tokens."""
    bounds = [0]
    for end in ends:
        bounds.append(min(max(end, bounds[-1]), tokens))
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


NONSENSE = [[9, 2, 5], [-7, 3, -1], [2**31 - 1, 0, 0], [-(2**31), 2**31 - 1, 4], [4, 4, 10**6], [-1, -2, -3]]


@pytest.mark.parametrize("ends", NONSENSE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nonsensical_offsets_stay_in_bounds(guard, ends, dtype):
    """Each row is written once: by the experts that the ends make, or with zeros."""
    weight, tokens = Weight(3, 20, 64), 7
    x, grad = guard(normal(tokens, 64, seed=1, dtype=dtype)), guard(normal(tokens, 20, seed=2, dtype=dtype))
    offsets = guard(offsets_of(ends))
    results = weight.grouped(x, offsets), weight.grouped_input_grad(grad, offsets)
    covered = 0
    for rows, values in zip(experts_of(ends, tokens), weight.values, strict=True):
        ref.assert_product(results[0][rows], x[rows], values)
        ref.assert_product(results[1][rows], grad[rows], values.t())
        covered = rows.stop
    for result in results:
        assert not result[covered:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, tokens", [((4, 35, 96), n) for n in (5, 50, 100, 200)] + [((4, 9, 33), 50)], ids=str)
def test_experts_of_many_rows(dtype, shape, tokens):
    """Of more rows than a kernel takes at a time, which it chooses by the mean; of rows and columns beside a tile."""
    ends = [tokens // 10, tokens // 10, tokens - 3, tokens - 1]
    weight, offsets = Weight(*shape, nested=True), offsets_of(ends)
    x, bias = normal(tokens, shape[2], seed=1, dtype=dtype), normal(*shape[:2], seed=2, dtype=dtype)
    grad = normal(tokens, shape[1], seed=3, dtype=dtype)
    result, back = weight.grouped(x, offsets, bias), weight.grouped_input_grad(grad, offsets)
    assert_equal(result, weight.grouped(x, offsets, bias))
    for expert, rows in enumerate(experts_of(ends, tokens)):
        ref.assert_product(result[rows], x[rows], weight.values[expert], bias[expert])
        ref.assert_product(back[rows], grad[rows], weight.values[expert].t())
    assert not result[-1].any() and not back[-1].any()


def test_more_experts_than_a_warp_has_lanes():
    ends = [2 * (expert // 2) for expert in range(1, 71)]  # every other expert has two tokens
    weight, offsets, tokens = Weight(70, 8, 32), offsets_of(ends), ends[-1]
    for dtype in (torch.float32, torch.float16):
        x = normal(tokens, 32, seed=1, dtype=dtype)
        result = weight.grouped(x, offsets)
        for expert, rows in enumerate(experts_of(ends, tokens)):
            ref.assert_product(result[rows], x[rows], weight.values[expert])


def test_no_experts_and_no_tokens():
    x = normal(3, 64)
    empty, absmax, nobody = torch.empty(0, 1, dtype=torch.uint8), torch.empty(0), offsets_of([])
    assert_equal(ops.grouped_linear_4bit(x, empty, absmax, None, nobody, [0, 5, 64], 64, "nf4"), torch.zeros(3, 5))
    assert weight_of_experts().grouped(normal(0, 64), offsets_of([0, 0])).shape == (0, 5)


def weight_of_experts() -> Weight:
    return Weight(2, 5, 64)


# ---- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fp4_is_exact_on_tensor_cores(dtype):
    """Of one term, the product is the weight, rounded once."""
    weight = Weight(48, 64, quant_type="fp4")
    assert_equal(weight.linear(torch.eye(64, dtype=dtype)), weight.values.t().to(dtype))


def test_scales_that_are_not_finite_stay_in_their_features():
    weight = Weight(40, 128)
    x = normal(3, 128, dtype=torch.bfloat16)
    expected = weight.linear(x)
    weight.absmax = weight.absmax.clone()
    weight.absmax[2 * 7], weight.absmax[2 * 30 + 1] = math.nan, math.inf
    y = weight.linear(x)
    assert y[:, 7].isnan().all() and not y[:, 30].isfinite().any()
    others = [feature for feature in range(40) if feature not in (7, 30)]
    assert_equal(y[:, others], expected[:, others])


def test_activations_beyond_the_last_row_are_not_looked_at():
    weight, wide = Weight(20, 64), normal(16, 64, dtype=torch.bfloat16)
    expected: Tensor = weight.linear(wide[:11].clone())
    wide[11:] = math.nan
    assert_equal(weight.linear(wide[:11]), expected)

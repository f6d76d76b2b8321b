"""Int8 quantization and products against bitsandbytes' bytes and against plain formulas (references/int8.py)."""

import math

import pytest
import torch

from bnbops.functional.int8 import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from bnbops.testing.references import int8 as ref
from cases import backends
from cases.int8 import DTYPES, activations, codes, equal, ops, scales

pytestmark = backends.on_every_backend
INF, NAN, MAX = math.inf, math.nan, torch.finfo(torch.float32).max


# ---- quantization ----------------------------------------------------------------------------------------------


@pytest.mark.every_torch
@pytest.mark.every_torch
@pytest.mark.parametrize("threshold", [0, 6])
def test_golden_quantization(threshold, golden):
    g = golden(f"int8_vectorwise_64x96_t{threshold}.safetensors")
    result, stats, columns = int8_vectorwise_quant(g["in.A"], threshold)
    assert equal(result, g["q"]) and equal(stats, g["row_stats"])
    assert (columns is None) == (threshold == 0)
    assert columns is None or equal(columns, g["outlier_cols"])
    assert equal(int8_vectorwise_dequant(result, stats), g["dequant"])


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantization_of_every_width(dtype, threshold, guard):
    """Around every vector and piece boundary, from misaligned memory."""
    for columns in [*range(0, 66), 127, 128, 129, 255, 256, 257, 513]:
        A = guard(activations(3, columns, dtype=dtype, seed=columns))
        row_codes, col_codes, row_stats, col_stats, outliers = ops.int8_double_quant(A, threshold)
        expected_codes, expected_stats, expected_outliers = ref.quantize_rows(A, threshold)
        assert equal(row_codes, expected_codes) and equal(row_stats, expected_stats)
        assert equal(outliers, expected_outliers)
        expected_codes, expected_stats = ref.quantize_columns(A, threshold)
        assert equal(col_codes, expected_codes) and equal(col_stats, expected_stats)
        vectorwise = ops.int8_vectorwise_quant(A, threshold)
        assert all(map(equal, vectorwise, (row_codes, row_stats, outliers)))


def test_rounding_is_to_nearest_even():
    """absmax 127 makes the factor 1."""
    halves = torch.arange(-126.5, 127, 1.0)
    A = torch.cat(
        [halves, halves.nextafter(torch.tensor(INF)), halves.nextafter(torch.tensor(-INF)), torch.tensor([127.0])]
    )
    result, stats, _ = ops.int8_vectorwise_quant(A)
    assert stats.item() == 127.0
    assert equal(result, A.round().to(torch.int8))  # torch.round is to even


SPECIAL = {
    "nan": ([1.0, NAN, -2.0], [64, 0, -127], 2.0),  # 63.5 is a tie
    "infinity": ([1.0, INF, -MAX], [0, 127, -127], MAX),
    "negative infinity": ([-INF, 3.0, NAN], [-127, 0, 0], MAX),
    "zeros": ([0.0, -0.0, 0.0], [0, 0, 0], 0.0),
    "only nan": ([NAN, NAN, NAN], [0, 0, 0], 0.0),
    "small": ([2.0**-120, -(2.0**-119), 0.0], [64, -127, 0], 2.0**-119),
    "denormal": ([1e-44, -1e-44, 0.0], [0, 0, 0], 1e-44),  # 127 / absmax is no float
    "largest": ([MAX, -MAX, MAX / 4], [127, -127, 32], MAX),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_special_values(case):
    values, expected, absmax = SPECIAL[case]
    A = torch.tensor([values, [1.0, 2.0, 3.0]])
    for threshold in (0.0, 1e-45):  # at the other one, every number but 0 is an outlier
        result, stats, outliers = ops.int8_vectorwise_quant(A, threshold)
        if threshold == 0:
            assert result[0].tolist() == expected and stats[0].item() == torch.tensor(absmax).item()
            assert not outliers.any()
            assert result[1].tolist() == [42, 85, 127] and stats[1].item() == 3.0  # other rows do not care
        else:
            assert not result.any() and not stats.any() and outliers.all()
        assert not ops.int8_vectorwise_dequant(result, stats).isnan().any()


def test_what_an_outlier_is():
    """From the threshold on, compared as float32; a NaN is none."""
    below, at = torch.tensor(6.0).nextafter(torch.tensor(0.0)).item(), 6.0
    A = torch.tensor([[below, at, NAN, INF, -at, -INF, 1.0], [1.0] * 7])
    result, stats, outliers = ops.int8_vectorwise_quant(A, 6.0)
    assert outliers.tolist() == [False, True, False, True, True, True, False]
    assert stats.tolist() == [below, 1.0]
    assert result[0].tolist() == [127, 0, 0, 0, 0, 0, 21] and result[1].tolist() == [127, 0, 127, 0, 0, 0, 127]
    tenth = torch.tensor([[0.1, 1.0]])  # the float 0.1 is larger than the double 0.1
    assert ops.int8_vectorwise_quant(tenth, 0.1)[2].tolist() == [True, True]
    assert ops.int8_vectorwise_quant(tenth, tenth[0, 0].item() + 1e-12)[2].tolist() == [False, True]
    assert ops.int8_vectorwise_quant(A, 1e300)[2].tolist() == [False, False, False, True, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantization(dtype, guard):
    for columns in [0, 1, 15, 16, 17, 64, 255, 256, 300]:
        A, stats = guard(codes(3, columns)), scales(3)
        assert equal(ops.int8_vectorwise_dequant(A, stats), ref.dequantize(A, stats))
    assert equal(ops.int8_vectorwise_dequant(codes(1, 4), torch.tensor([INF]))[codes(1, 4) == 0], torch.zeros(0))


def test_an_infinite_scale_makes_no_nan():
    A = torch.tensor([[0, 1, -1]], dtype=torch.int8)
    assert equal(ops.int8_vectorwise_dequant(A, torch.tensor([INF])), ref.dequantize(A, torch.tensor([INF])))
    assert ops.int8_vectorwise_dequant(A, torch.tensor([INF]))[0, 0] == 0
    assert ops.int8_vectorwise_dequant(A, torch.tensor([NAN])).isnan().all()


# ---- products --------------------------------------------------------------------------------------------------


def test_products_of_every_depth(guard):
    """Every K up to two vectors and more, row counts around every tile."""
    row_counts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 18, 19, 20]
    for K in range(0, 131):
        for M in {row_counts[K % 19], row_counts[(7 * K + 3) % 19], 1}:
            N = (1, 3, 4, 5, 64, 65)[(K + M) % 6]
            A, B = guard(codes(M, K, seed=K)), guard(codes(N, K, seed=K + 1))
            assert equal(ops.int8_linear_matmul(A, B), ref.product(A, B)), (M, N, K)


@pytest.mark.parametrize("M", [1, 4, 5, 17, 32, 33, 47, 48, 63, 255, 257, 300, 513])
def test_products_of_many_rows(M):
    for N, K in [(64, 512), (130, 513), (65, 1025)]:
        A, B = codes(M, K), codes(N, K, seed=1)
        assert equal(ops.int8_linear_matmul(A, B), ref.product(A, B)), (M, N, K)


@pytest.mark.parametrize("M", [1, 3, 6, 40])
def test_products_do_not_overflow(M):
    """The largest sums: of 131071 products (-128) * (-128), 2^31 - 2^14."""
    K = 131071
    lowest, highest = torch.full((M, K), -128, dtype=torch.int8), torch.full((M, K), 127, dtype=torch.int8)
    B = torch.cat([lowest[:1], highest[:1]])
    for A in (lowest, highest):
        assert equal(ops.int8_linear_matmul(A, B), (A[0].double() @ B.double().t()).int().expand(M, 2))
    with pytest.raises(RuntimeError, match="A has 131072 columns; an int32 holds the sum of at most 131071"):
        ops.int8_linear_matmul(torch.zeros(1, K + 1, dtype=torch.int8), torch.zeros(1, K + 1, dtype=torch.int8))


def test_strided_operands():
    A, B = codes(9, 140), codes(70, 140, seed=1)
    expected = ref.product(A[:, ::2], B[:, ::2])
    assert equal(ops.int8_linear_matmul(A[:, ::2], B[:, ::2]), expected)
    assert equal(ops.int8_linear_matmul(A.t().contiguous().t(), B.t().contiguous().t()), ref.product(A, B))
    assert equal(ops.int8_linear_matmul(A[:1].expand(6, 140), B), ref.product(A[:1].expand(6, 140), B))
    out = torch.full((70, 9), -1, dtype=torch.int32).t()
    ops.int8_linear_matmul.out(A[:, ::2], B[:, ::2], out=out)
    assert equal(out, expected)


def test_out_is_written_and_nothing_else(guard):
    for M, N in [(1, 1), (3, 5), (7, 64), (40, 67)]:
        A, B, out = codes(M, 70), codes(N, 70, seed=1), guard(torch.zeros(M, N, dtype=torch.int32))
        ops.int8_linear_matmul.out(A, B, out=out)
        assert equal(out, ref.product(A, B))


# ---- what a product means --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantized_products(dtype):
    """Bit for bit, fused with the product and apart from it."""
    for M, N in [(1, 1), (3, 63), (5, 64), (6, 65), (40, 130)]:
        A, B = codes(M, 70), codes(N, 70, seed=1)
        rows, columns, sums = scales(M), 1e-3 * scales(N, seed=1), ref.product(A, B)
        for bias in (None, torch.randn(N, generator=torch.Generator().manual_seed(0)).to(dtype)):
            expected = ref.dequantize_product(sums, rows, columns, bias, dtype)
            assert equal(ops.int8_mm_dequant(sums, rows, columns, dtype, bias), expected)
            assert equal(ops.int8_scaled_mm(A, B, rows, columns, bias, dtype), expected)
    assert ops.int8_mm_dequant(sums, rows, columns).dtype == torch.float16


def test_large_sums_are_rounded_to_nearest():
    """int32 to float32: 2^24 + 1 is a tie."""
    sums = torch.tensor([[2**24 + 1, 2**24 + 3, -(2**31), 2**31 - 1]], dtype=torch.int32)
    one = torch.ones(4)
    expected = ref.dequantize_product(sums, one[:1], one, None, torch.float32)
    assert equal(ops.int8_mm_dequant(sums, one[:1], one, torch.float32), expected)


def test_infinite_statistics_make_no_nan():
    sums = torch.tensor([[0, 1, -1], [0, 5, 0]], dtype=torch.int32)
    for rows in ([INF, 0.0], [0.0, INF], [MAX, MAX]):
        for columns in ([INF, 1.0, 2.0], [0.0, INF, MAX]):
            arguments = sums, torch.tensor(rows), torch.tensor(columns)
            result = ops.int8_mm_dequant(*arguments, torch.float32)
            assert not result.isnan().any() and (result[sums == 0] == 0).all()
            assert equal(result, ref.dequantize_product(*arguments, None, torch.float32))
    assert ops.int8_mm_dequant(sums, torch.tensor([NAN, 1.0]), torch.ones(3), torch.float32)[0].isnan().all()


# ---- functions -------------------------------------------------------------------------------------------------


def test_functions_have_bitsandbytes_results():
    A = activations(5, 70, dtype=torch.float16, outliers=3)
    result, stats, columns = int8_vectorwise_quant(A, threshold=6.0)
    assert (
        columns.dtype == torch.int64 and columns.tolist() == ref.quantize_rows(A, 6.0)[2].nonzero().flatten().tolist()
    )
    assert int8_vectorwise_quant(A)[2] is None
    assert int8_vectorwise_quant(A, threshold=1e4)[2].tolist() == []
    row_codes, col_codes, row_stats, col_stats, same = int8_double_quant(A, threshold=6.0)
    assert equal(row_codes, result) and equal(row_stats, stats) and equal(same, columns)
    assert all(map(equal, (col_codes, col_stats), ref.quantize_columns(A, 6.0)))
    assert int8_double_quant(A)[4] is None
    sums = int8_linear_matmul(result, codes(9, 70))
    assert equal(sums, ref.product(result, codes(9, 70)))
    out = torch.empty_like(sums)
    assert int8_linear_matmul(result, codes(9, 70), out=out) is out and equal(out, sums)
    bias = scales(9, seed=1).half()
    values = int8_mm_dequant(sums, stats, scales(9), bias=bias)
    assert equal(values, ref.dequantize_product(sums, stats, scales(9), bias))
    out = torch.empty(5, 9, dtype=torch.float16)
    assert int8_mm_dequant(sums, stats, scales(9), out=out, bias=bias) is out and equal(out, values)


def test_functions_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match=r"int8_linear_matmul gives int32, not torch\.float32"):
        int8_linear_matmul(codes(3, 8), codes(5, 8), dtype=torch.float32)
    for name in ("col_stats", "row_stats", "out_col", "out_row"):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            int8_double_quant(activations(3, 8), **{name: torch.empty(3)})

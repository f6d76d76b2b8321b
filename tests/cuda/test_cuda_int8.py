"""The int8 operators' CUDA kernels, run by the simulator, have the bits of the CPU's.

Shapes sweep what the kernels distinguish: eight elements at a time, a warp or a thread block to a row (up to and beyond
1024 columns), thread blocks that go on to further rows, tiles of 16 rows by 32 columns, and products by torch.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bnbops.testing.references import int8 as ref
from cases import backends
from cases.int8 import DTYPES, activations, codes, equal, ops, scales

INF, NAN, MAX = math.inf, math.nan, torch.finfo(torch.float32).max
EVERY_COLUMN = 1e-45  # a threshold that makes all numbers but 0 outliers
WIDTHS = [*range(0, 41), 63, 64, 65, 127, 128, 129, 255, 256, 257, 513, 1023, 1024, 1025, 2049]


@pytest.fixture(scope="module")
def cuda() -> dict[str, Callable]:
    return backends.simulated()


def same(actual: Tensor, expected: Tensor) -> bool:
    """The same bits, of zeros and NaN too."""
    if actual.dtype.is_floating_point and actual.dtype == expected.dtype:
        integer = torch.int32 if actual.dtype == torch.float32 else torch.int16
        actual, expected = actual.view(integer), expected.view(integer)
    return equal(actual, expected)


def odd(x: Tensor) -> Tensor:
    """With a row of zeros and every kind of special value, where there is room."""
    for i, value in enumerate([NAN, INF, -INF, -0.0, 1e-41, MAX]):
        x[2 * i : 2 * i + 1, 5 * i : 5 * i + 1] = value
    x[1:2] = 0.0
    return x


# ---- quantization ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.3, 6.0, EVERY_COLUMN])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantization(dtype, threshold, cuda, guard):
    for columns in WIDTHS:
        A = guard(odd(activations(3, columns, dtype=dtype, seed=columns)))
        results = cuda["int8_double_quant"](A, threshold)
        assert all(map(same, results, ops.int8_double_quant(A, threshold))), columns
        assert all(map(same, cuda["int8_vectorwise_quant"](A, threshold), (results[0], results[2], results[4])))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize(
    "shape", [(0, 70), (5, 0), (300, 9), (131, 300), (40, 1030), (2, 20, 1025), (1, 9000)], ids=str
)
def test_quantization_of_many_rows(shape, threshold, cuda):
    """More rows than thread blocks take at once; more than one part of columns; lists that take several rounds."""
    A = activations(*shape, outliers=min(7, shape[-1])) if shape[0] else torch.empty(shape)
    assert all(map(same, cuda["int8_double_quant"](A, threshold), ops.int8_double_quant(A, threshold)))


def test_dequantization(cuda, guard):
    for columns in WIDTHS:
        A, stats = guard(codes(5, columns)), guard(torch.tensor([1.5, INF, NAN, 0.0, 1e-41]))
        assert same(cuda["int8_vectorwise_dequant"](A, stats), ops.int8_vectorwise_dequant(A, stats)), columns
    A, stats = codes(200, 100), scales(200)
    assert same(cuda["int8_vectorwise_dequant"](A, stats), ops.int8_vectorwise_dequant(A, stats))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_multiply_the_decoded_weight(dtype, cuda, guard):
    """The identity's product with it is itself; a wide one is decoded in two panels."""
    for columns in (1, 9, 700, 8192, 8193, 8211):
        weight, scale = guard(codes(3, columns)), 0.1 * scales(3)
        result = cuda["linear_int8_input_grad"](torch.eye(3, dtype=dtype), weight, scale)
        assert equal(result, ref.dequantize(weight, scale).to(dtype)), columns


# ---- products --------------------------------------------------------------------------------------------------


def test_products(cuda, guard):
    """Every depth up to 40, tiles that end anywhere, more turns along the depth than warps."""
    for K in [*range(0, 41), 63, 64, 65, 127, 128, 129, 511, 512, 513, 1100]:
        for M, N in [(1, 40), (7, 1), (8, 33), (9, 31), (16, 32), (17, 8), (17, 9), (35, 64), (33, 70)]:
            if (K + M) % 3 and K > 3:  # a third of the depths each
                continue
            A, B = guard(codes(M, K, seed=K)), guard(codes(N, K, seed=K + 1))
            out = guard(torch.zeros(M, N, dtype=torch.int32))
            cuda["int8_linear_matmul.out"](A, B, out=out)
            assert equal(out, ref.product(A, B)), (M, N, K)
            assert equal(cuda["int8_linear_matmul"](A, B), out)


@pytest.fixture
def products() -> Iterator[list[tuple[int, ...]]]:
    """The products that torch is asked for, by their sizes."""
    asked: list[tuple[int, ...]] = []

    def multiply(A: Tensor, B: Tensor, *, out: Tensor) -> Tensor:
        asked.append((*A.shape, B.shape[1]))
        return out.copy_(A.double() @ B.double())

    with torch.library._scoped_library("aten", "IMPL") as lib:
        lib.impl("_int_mm.out", multiply, "CPU", allow_override=True)
        yield asked


def test_torch_multiplies_what_it_can(cuda, products):
    """From 17 rows on, in multiples of 8, from aligned memory."""
    memory = torch.zeros(24 * 32 + 1, dtype=torch.int8)
    for rows, columns, depth, begin, by_torch in [
        (17, 24, 32, 0, True),
        (16, 24, 32, 0, False),
        (17, 20, 32, 0, False),
        (17, 24, 20, 0, False),
        (17, 24, 32, 1, False),
    ]:
        A, B = codes(rows, depth), memory[begin : begin + columns * depth].view(columns, depth)
        B.copy_(codes(columns, depth))
        products.clear()
        assert equal(cuda["int8_linear_matmul"](A, B), ref.product(A, B))
        cuda["int8_scaled_mm"](A, B, scales(rows), scales(columns))
        assert products == [(rows, depth, columns)] * 2 * by_torch, (rows, columns, depth, begin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantized_products(dtype, cuda, guard):
    for M, N, K in [
        (0, 5, 8),
        (1, 1, 9),
        (3, 63, 70),
        (15, 64, 64),
        (17, 65, 70),
        (17, 264, 64),
        (40, 257, 33),
        (40, 520, 16),
    ]:
        A, B = guard(codes(M, K)), guard(codes(N, K, seed=1))
        rows, columns, sums = guard(scales(M)), guard(1e-3 * scales(N, seed=1)), guard(ops.int8_linear_matmul(A, B))
        rows[1:2], columns[2:3], columns[3:4] = INF, NAN, MAX
        for bias in (None, *(guard(scales(N, seed=2).to(d)) for d in DTYPES)):
            expected = ops.int8_mm_dequant(sums, rows, columns, dtype, bias)
            assert same(cuda["int8_mm_dequant"](sums, rows, columns, dtype, bias), expected), (M, N, K)
            assert same(cuda["int8_scaled_mm"](A, B, rows, columns, bias, dtype), expected), (M, N, K)


# ---- the linear layer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outliers", [0, 1, 15, 16, 17, 70])
def test_linear(dtype, outliers, cuda, guard):
    """By both ways to multiply. Outliers' products are added in the order of the columns, on every device."""
    for M, N, K in [(1, 67, 300), (5, 64, 201), (16, 33, 80), (17, 264, 80), (40, 8, 264), (40, 9, 260)]:
        x = guard(odd(activations(M, K, dtype=dtype, seed=M, outliers=outliers)))
        weight, scale, bias = guard(codes(N, K)), guard(0.1 * scales(N)), guard(scales(N, seed=1).to(dtype))
        for threshold, added in ((6.0, bias), (6.0, None), (0.0, bias)):
            arguments = x, weight, scale, added, threshold
            assert same(cuda["linear_int8"](*arguments), ops.linear_int8(*arguments)), (M, N, K, threshold)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_where_every_column_has_outliers(dtype, cuda):
    for M, N, K in [(3, 40, 130), (20, 40, 136)]:
        x, weight, scale = activations(M, K, dtype=dtype), codes(N, K), 0.1 * scales(N)
        arguments = x, weight, scale, None, EVERY_COLUMN
        assert same(cuda["linear_int8"](*arguments), ops.linear_int8(*arguments)), (M, N, K)


def test_a_threshold_that_nothing_reaches_changes_no_bit(cuda):
    """Not even the sign of a zero, to which negative results too small for a float are rounded."""
    for rows in (3, 17):
        x, weight, scale = activations(rows, 64), codes(24, 64), torch.full((24,), 1e-45)
        result = cuda["linear_int8"](x, weight, scale, None, 1e4)
        assert (result.signbit() & (result == 0)).any()
        assert same(result, ops.linear_int8(x, weight, scale, None, 1e4))


def test_linear_lists_outliers_anywhere(cuda):
    """In the first and the last of many columns; the list is made in rounds of 8192."""
    x, weight, scale = activations(2, 20000), codes(3, 20000), scales(3)
    x[0, [0, 7, 8, 255, 256, 8191]], x[1, [8192, 16384, 19999]] = 7.0, -8.0
    arguments = x, weight, scale, None, 6.0
    assert same(cuda["linear_int8"](*arguments), ops.linear_int8(*arguments))


@pytest.mark.parametrize("order", ["reverse", "random:1", "random:2"])
def test_the_order_of_threads_does_not_matter(order, cuda, monkeypatch):
    monkeypatch.setenv("CUSIM_ORDER", order)
    for M in (9, 40):
        x, weight, scale, bias = activations(M, 1040, outliers=20), codes(40, 1040), scales(40), scales(40, seed=1)
        arguments = x, weight, scale, bias, 6.0
        assert same(cuda["linear_int8"](*arguments), ops.linear_int8(*arguments))
        assert all(map(same, cuda["int8_double_quant"](x, 6.0), ops.int8_double_quant(x, 6.0)))

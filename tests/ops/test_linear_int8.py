"""linear_int8, linear_int8_weight_only and their gradient: against bitsandbytes' golden layer, plain formulas
(bnbops/testing/references/int8.py) and autograd."""

import ctypes
import math
import mmap
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from bnbops.testing.references import int8 as ref
from cases import backends
from cases.int8 import DTYPES, activations, assert_within, codes, equal, ops, scales

pytestmark = backends.on_every_backend
INF, NAN, MAX = math.inf, math.nan, torch.finfo(torch.float32).max


@pytest.mark.every_torch
@pytest.mark.every_torch
@pytest.mark.parametrize("threshold", [0, 6])
def test_golden_layer(threshold, golden):
    """bitsandbytes' recorded forward is that of training: x times the decoded weight, without rounding x to codes. To
    the product of codes the difference is at most half a code of each activation."""
    g = golden(f"linear8bitlt_64x96_t{threshold}.safetensors")
    x, weight, scale = g["in.x"], g["state_dict.weight"], g["state_dict.SCB"]
    result, stats, _ = ops.int8_vectorwise_quant(g["in.weight"])
    assert equal(result, weight) and equal(stats, scale)
    y = ops.linear_int8(x, weight, scale, g["in.bias"], float(threshold))
    W = ref.dequantize(weight, scale).double()
    size = x.double().abs() @ W.abs().t() + 1
    assert_within(ops.linear_int8_weight_only(x, weight, scale, g["in.bias"]), g["out.forward"].double(), 2**-13 * size)
    _, activation_stats, _ = ref.quantize_rows(x, float(threshold))
    allowed = activation_stats.double()[:, None] / 254 * W.abs().sum(1)
    allowed += 2**-10 * (x.double().abs() @ W.abs().t() + 1)  # float16 of x, W and the results
    assert_within(y, g["out.forward"].double(), allowed)
    grad = (2 * g["out.forward"].float()).half()
    allowed = 2**-10 * (grad.double().abs() @ W.abs() + 1)
    assert_within(ops.linear_int8_input_grad(grad, weight, scale), g["out.grad_x"].double(), allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outliers", [0, 1, 5, 65, 200])
def test_linear(dtype, outliers):
    for M, N, K in [(1, 67, 300), (2, 1, 200), (5, 64, 201), (20, 130, 257), (40, 9, 260)]:
        x = activations(M, K, dtype=dtype, seed=M, outliers=outliers)
        weight, scale, bias = codes(N, K), 0.1 * scales(N), scales(N, seed=1).to(dtype)
        expected, error = ref.linear(x, weight, scale, bias, 6.0)
        y = ops.linear_int8(x, weight, scale, bias, 6.0)
        assert y.dtype == dtype
        assert_within(y, expected, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_only(dtype):
    """The product with the decoded weight, of one panel and of several; a NaN stays one."""
    for shape, N in [((1, 200), 67), ((2, 3, 65), 9), ((70,), 130), ((5, 64), 1100), ((0, 64), 9), ((3, 0), 9)]:
        x, weight, scale = activations(*shape, dtype=dtype), codes(N, shape[-1]), 0.1 * scales(N)
        W = ref.dequantize(weight, scale).to(dtype)
        for bias in (None, scales(N, seed=1).to(dtype)):
            y, b = ops.linear_int8_weight_only(x, weight, scale, bias), 0.0 if bias is None else bias.double()
            eps = torch.finfo(dtype).eps
            expected, size = (f(x.double()) @ f(W.double()).t() + b for f in (Tensor.clone, Tensor.abs))
            assert y.dtype == dtype
            assert_within(y, expected, eps * expected.abs() + 4 * torch.finfo(torch.float32).eps * size)
    weight = codes(9, 3).clamp(1, 9)
    assert ops.linear_int8_weight_only(torch.tensor([NAN, 1, 1], dtype=dtype), weight, scales(9), None).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_without_outliers_is_exact(dtype):
    """The bits of quantization, product and dequantization one after the other."""
    for M, N, K in [(1, 67, 300), (4, 64, 200), (33, 70, 700)]:
        x, weight, scale = activations(M, K, dtype=dtype), codes(N, K), 0.1 * scales(N)
        bias = scales(N, seed=1).to(dtype)
        rows, stats, _ = ref.quantize_rows(x)
        expected = ref.dequantize_product(ref.product(rows, weight), stats, scale, bias, dtype)
        assert equal(ops.linear_int8(x, weight, scale, bias, 0.0), expected)
        assert equal(ops.int8_scaled_mm(*ops.int8_vectorwise_quant(x)[:1], weight, stats, scale, bias, dtype), expected)


def test_a_row_does_not_depend_on_the_others():
    """One row or many take different ways; the bits are the same. (With a threshold, rows share outlier columns.)"""
    x, weight, scale = activations(70, 500), codes(70, 500), scales(70)
    for threshold, columns in ((0.0, []), (6.0, [3, 400])):
        x[:, columns] = 7.0
        together = ops.linear_int8(x, weight, scale, None, threshold)
        for rows in (1, 2, 4, 5, 16, 17, 33):
            assert equal(ops.linear_int8(x[:rows], weight, scale, None, threshold), together[:rows])


def test_threads_do_not_matter():
    x, weight, scale = activations(300, 700, outliers=5), codes(300, 700), scales(300)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append([ops.linear_int8(x[:rows], weight, scale, None, 6.0) for rows in (1, 4, 20, 300)])
        results[-1] += ops.int8_double_quant(x, 6.0)
    assert all(all(map(equal, result, results[0])) for result in results[1:])


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_nan_and_infinite_activations(threshold):
    """NaN counts as 0, infinity as the largest float; other rows do not notice."""
    weight, scale = codes(9, 70), 1e-3 * scales(9)
    x = activations(4, 70)
    clean = x.clone()
    x[1, 3], clean[1, 3] = NAN, 0.0
    x[2, 5], clean[2, 5] = INF, MAX
    x[2, 6], clean[2, 6] = -INF, -MAX
    y = ops.linear_int8(x, weight, scale, None, threshold)
    assert not y.isnan().any()
    assert equal(y, ops.linear_int8(clean, weight, scale, None, threshold))
    expected, error = ref.linear(clean, weight, scale, None, threshold)
    finite = [0, 1, 3]
    assert_within(y[finite], expected[finite], error[finite])
    if threshold == 0:  # else columns 5 and 6 are multiplied in floating point, for all rows
        assert equal(y[finite], ops.linear_int8(x[finite], weight, scale, None, threshold))


@pytest.mark.parametrize("shape", [(0, 70), (2, 0, 70), (70,), (2, 3, 70), (1, 1, 1, 70)], ids=str)
def test_shapes(shape):
    x, weight, scale, bias = activations(*shape), codes(9, 70), scales(9), scales(9, seed=1)
    expected, error = ref.linear(x, weight, scale, bias, 0.0)
    assert_within(ops.linear_int8(x, weight, scale, bias, 0.0), expected, error)
    assert ops.linear_int8_input_grad(torch.ones(*shape[:-1], 9), weight, scale).shape == shape


def test_no_products_leave_the_bias():
    y = ops.linear_int8(torch.ones(3, 0), codes(9, 0), scales(9), scales(9, seed=1), 1.0)
    assert equal(y, scales(9, seed=1).expand(3, 9))
    assert ops.linear_int8(torch.ones(3, 7), codes(0, 7), scales(0), None, 1.0).shape == (3, 0)
    assert equal(ops.linear_int8_input_grad(torch.ones(3, 0), codes(0, 7), scales(0)), torch.zeros(3, 7))


def before_a_wall(x: Tensor) -> Tensor:
    """A copy that ends where the process may not read on."""
    page = mmap.PAGESIZE
    size = -(x.nbytes // -page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0) == 0
    last = torch.frombuffer(memory, dtype=torch.uint8, offset=size - x.nbytes, count=x.nbytes)
    return last.view(x.dtype).view(x.shape).copy_(x)


@pytest.mark.parametrize("M", [1, 2, 6, 40])
def test_nothing_is_read_beyond_the_weight(M):
    for N, K in [(1, 1), (3, 63), (5, 65), (66, 100), (67, 700)]:
        weight, x, scale = before_a_wall(codes(N, K)), before_a_wall(activations(M, K)), before_a_wall(scales(N))
        expected, error = ref.linear(x, weight, scale, None, 0.0)
        assert_within(ops.linear_int8(x, weight, scale, None, 0.0), expected, error)


# ---- gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_decoded_weight(dtype):
    """Of x @ W.T + bias; W takes several panels."""
    weight, scale = codes(20, 1100), 0.1 * scales(20)
    W = ref.dequantize(weight, scale).to(dtype)
    for shape in ((1100,), (4, 1100), (2, 3, 1100)):
        x, bias = activations(*shape, dtype=dtype).requires_grad_(), scales(20).to(dtype).requires_grad_()
        grad = activations(*shape[:-1], 20, dtype=dtype, seed=1)
        actual = torch.autograd.grad(ops.linear_int8(x, weight, scale, bias, 6.0), (x, bias), grad)
        same = torch.autograd.grad(ops.linear_int8_weight_only(x, weight, scale, bias), (x, bias), grad)
        assert all(map(equal, actual, same))
        expected = torch.autograd.grad(torch.nn.functional.linear(x, W, bias), (x, bias), grad)
        assert [g.dtype for g in actual] == [dtype, dtype]
        size = (ref.matrix(grad).double().abs() @ W.double().abs()).view(shape)
        assert_within(actual[0], expected[0].double(), 2 * torch.finfo(dtype).eps * size)
        assert equal(actual[1], expected[1])


def test_gradient_of_the_gradient():
    """linear_int8_input_grad is linear in grad; its adjoint multiplies by the decoded weight, without codes."""
    weight, scale = codes(6, 9), scales(6)
    W = ref.dequantize(weight, scale)
    grad = activations(4, 6).requires_grad_()
    direction = activations(4, 9, seed=1).requires_grad_()
    (back,) = torch.autograd.grad(ops.linear_int8_input_grad(grad, weight, scale), grad, direction, create_graph=True)
    torch.testing.assert_close(back, direction @ W.t())
    torch.testing.assert_close(*torch.autograd.grad(back, direction, torch.ones(4, 6)), torch.ones(4, 6) @ W)
    x = activations(4, 9).requires_grad_()
    (once,) = torch.autograd.grad(ops.linear_int8(x, weight, scale, None, 0.0).square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), x)
    torch.testing.assert_close(twice, 2 * torch.ones(4, 9) @ W.t() @ W, rtol=1e-4, atol=1e-2)


def test_gradient_of_dequantization():
    A, stats = codes(2, 3, 70), scales(6).view(2, 3).requires_grad_()
    grad = activations(2, 3, 70)
    actual = torch.autograd.grad(ops.int8_vectorwise_dequant(A, stats), stats, grad, create_graph=True)
    expected = torch.autograd.grad(A * stats.unsqueeze(-1) / 127, stats, grad)
    torch.testing.assert_close(actual, expected)


def test_only_weight_and_scale_are_saved():
    x, weight, scale = activations(8, 70).requires_grad_(), codes(9, 70), scales(9)
    for layer in (partial(ops.linear_int8, threshold=0.0), ops.linear_int8_weight_only):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            layer(x, weight, scale, scales(9).requires_grad_())
        assert {t.data_ptr() for t in saved} == {weight.data_ptr(), scale.data_ptr()}


def test_autocast():
    """As torch's own layer: activations and bias are cast, scales are not."""
    x, weight, scale, bias = activations(5, 70), codes(9, 70), scales(9), scales(9, seed=1)
    for layer in (partial(ops.linear_int8, threshold=0.0), ops.linear_int8_weight_only):
        expected = layer(x.bfloat16(), weight, scale, bias.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert equal(layer(x, weight, scale, bias), expected)


def test_what_is_not_differentiable_says_so():
    x, weight, scale = activations(8, 70).requires_grad_(), codes(9, 70), scales(9).requires_grad_()
    with pytest.raises(RuntimeError, match="linear_int8: scale is not differentiable; detach it"):
        ops.linear_int8(x, weight, scale, None, 0.0)
    with pytest.raises(RuntimeError, match="linear_int8_input_grad: scale is not differentiable"):
        ops.linear_int8_input_grad(torch.ones(8, 9), weight, scale)
    assert not any(t.requires_grad for t in ops.int8_double_quant(x, 1.0))
    sums = torch.zeros(8, 9, dtype=torch.int32)
    assert not ops.int8_mm_dequant(sums, torch.ones(8), scale).requires_grad


def test_autograd_notices_a_written_out():
    out, x = torch.ones(3, 9, dtype=torch.int32), torch.ones(3, 9, requires_grad=True)
    product = (x * out).sum()
    ops.int8_linear_matmul.out(codes(3, 7), codes(9, 7), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# ---- the compiler ----------------------------------------------------------------------------------------------


def test_one_graph_for_all_batches():
    """Forward and backward, with a threshold: outliers do not make shapes depend on data."""
    counter = CompileCounterWithBackend("aot_eager")
    weight, scale, bias = codes(30, 64), scales(30), scales(30, seed=1)

    def layer(x: Tensor) -> Tensor:
        return ops.linear_int8(x, weight, scale, bias, 6.0)

    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 17, 64, 5):
        x = activations(rows, 64, outliers=3).requires_grad_()
        y = compiled(x)
        assert equal(y, layer(x))
        actual, expected = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, layer))
        assert equal(*actual, *expected)
    assert counter.frame_count == 1


def test_export_keeps_a_dynamic_batch():
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", codes(30, 64))
            self.register_buffer("scale", scales(30))

        def forward(self, x: Tensor) -> Tensor:
            return ops.linear_int8(x, self.weight, self.scale, None, 6.0)

    program = torch.export.export(Layer(), (activations(5, 64),), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    x = activations(21, 64, outliers=4)
    assert equal(program.module()(x), Layer()(x))

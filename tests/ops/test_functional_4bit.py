"""bnbops.functional's 4-bit functions and bnbops.matmul_4bit: bitsandbytes' names, defaults and order of arguments."""

import warnings

import pytest
import torch

import bnbops
import bnbops.functional as F
from cases.quantize_4bit import check, data, dtypes, quantize, same_bits, types
from cases.weights_4bit import Weight, assert_equal, normal
from reference import quantize_4bit as ref

# ---- bnbops.functional -----------------------------------------------------------------------------------------


@types
@dtypes
@pytest.mark.parametrize("compress", [False, True])
def test_functional_there_and_back(quant_type, dtype, compress):
    x = data(40, 100, dtype=dtype)
    packed, state = F.quantize_4bit(x, blocksize=128, compress_statistics=compress, quant_type=quant_type)
    check(x, 128, quant_type, packed, quantize(x, 128, quant_type, torch.uint8)[1])
    assert (state.shape, state.dtype, state.blocksize, state.quant_type) == (x.shape, dtype, 128, quant_type)
    assert torch.equal(state.code, ref.TABLES[quant_type])
    scales = state.absmax
    if compress:
        assert state.absmax.dtype == torch.uint8
        scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    values = F.dequantize_4bit(packed, state)
    assert same_bits(values, ref.dequantize(packed, scales, 128, quant_type, list(x.shape), dtype))


def test_functional_defaults_are_bitsandbytes():
    """FP4 in blocks of 64, in uint8; quantize_nf4 and quantize_fp4 are what they say."""
    x = data(10, 100)
    packed, state = F.quantize_4bit(x)
    assert (state.quant_type, state.blocksize, packed.dtype, packed.shape) == ("fp4", 64, torch.uint8, (500, 1))
    assert state.absmax.dtype == torch.float32 and not state.nested and state.state2 is None
    for f, back, quant_type in ((F.quantize_nf4, F.dequantize_nf4, "nf4"), (F.quantize_fp4, F.dequantize_fp4, "fp4")):
        packed, state = f(x)
        check(x, 64, quant_type, packed, state.absmax)
        assert torch.equal(back(packed, state), F.dequantize_4bit(packed, state))


def test_functional_arguments_by_position():
    """bitsandbytes' order: A, absmax, out, blocksize, compress_statistics, quant_type, quant_storage; and
    A, quant_state, absmax, out, blocksize, quant_type."""
    x, absmax, out = data(8, 100), torch.zeros(13), torch.zeros(200, 1, dtype=torch.bfloat16)
    packed, state = F.quantize_4bit(x, absmax, out, 64, False, "nf4", torch.bfloat16)
    assert packed is out and state.absmax is absmax
    check(x, 64, "nf4", packed, absmax)
    values = torch.zeros(8, 100)
    assert F.dequantize_4bit(packed, None, absmax, values, 64, "nf4") is values
    assert torch.equal(values, F.dequantize_4bit(packed, state))
    again = torch.zeros(8, 100)
    assert F.dequantize_nf4(packed, state, out=again) is again and torch.equal(again, values)


@pytest.mark.parametrize("shape", [(10, 64), (7, 33), (1, 50)], ids=str)
def test_transposed_codes_give_the_transposed_values(shape):
    """[1, n] as bitsandbytes has it, and rows of codes [out, in / 2], transposed."""
    x = data(*shape)
    packed, state = F.quantize_nf4(x)
    values = F.dequantize_4bit(packed, state)
    assert torch.equal(F.dequantize_4bit(packed.t(), state), values.t())
    if shape == (10, 64):
        rows = packed.view(10, 32)
        assert torch.equal(F.dequantize_4bit(rows, state), values)
        assert torch.equal(F.dequantize_4bit(rows.t(), state), values.t())


def test_transposed_codes_of_no_matrix_are_refused():
    packed, state = F.quantize_nf4(data(2, 3, 64))
    assert F.dequantize_4bit(packed, state).shape == (2, 3, 64)
    with pytest.raises(ValueError, match=r"stand for a transposed matrix, but the state's shape is \[2, 3, 64\]"):
        F.dequantize_4bit(packed.t(), state)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: F.quantize_4bit(x.double()), "takes float32, bfloat16 or float16"),
        (lambda x: F.quantize_4bit(x, blocksize=48), "blocksize must be one of 32, 64"),
        (lambda x: F.quantize_4bit(x, blocksize=0), "blocksize must be one of"),
        (lambda x: F.quantize_4bit(x, quant_type="int5"), "quant_type must be 'nf4' or 'fp4' or 'int4', got 'int5'"),
        (lambda x: F.quantize_4bit(x, quant_storage=torch.int32), "quant_storage must be uint8, int8"),
        (lambda x: F.quantize_4bit(x, absmax=torch.zeros(3)), "size of tensor|must match"),
        (lambda x: F.dequantize_4bit(x.byte()), "needs a quant_state, or both absmax and out"),
        (lambda x: F.dequantize_4bit(x.byte(), absmax=torch.ones(1)), "needs a quant_state, or both absmax and out"),
        (lambda x: F.dequantize_4bit(x.byte(), absmax=torch.ones(1), out=x.double()), "float32, bfloat16 or float16"),
        (lambda x: F.dequantize_4bit(x.byte(), absmax=torch.ones(1), out=x), "A has 640 bytes, but shape .* needs 320"),
    ],
)
def test_functional_refuses(call, match):
    with pytest.raises((ValueError, RuntimeError), match=match):
        call(data(10, 64))


# ---- bnbops.matmul_4bit, gemv_4bit -----------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("nested", [False, True])
def test_matmul_takes_every_form_of_the_weight(dtype, nested):
    """[n, 1], its transpose, rows, their transpose; the state's shape counts."""
    weight, x, bias = Weight(20, 64, nested=nested), normal(2, 3, 64, dtype=dtype), normal(20, seed=2, dtype=dtype)
    expected = weight.linear(x, bias)
    rows = weight.packed.view(20, 32)
    for packed in (weight.packed, weight.packed.t(), rows, rows.t(), weight.packed.view(-1).view(torch.bfloat16)):
        assert_equal(bnbops.matmul_4bit(x, packed, weight.state, bias=bias), expected)
        assert_equal(F.gemv_4bit(x, packed, state=weight.state), weight.linear(x))
    out = torch.zeros(2, 3, 20, dtype=dtype)
    assert bnbops.matmul_4bit(x, weight.packed, weight.state, out, bias) is out
    assert_equal(out, expected)
    assert F.gemv_4bit(x, weight.packed.t(), out, False, True, weight.state) is out
    assert_equal(out, weight.linear(x))


def test_matmul_with_a_weight_quantized_the_other_way():
    """[K, N] in the state: A @ W, with its gradient, and bitsandbytes' warning."""
    weight, x, bias = Weight(64, 20), normal(3, 64).requires_grad_(), normal(20, seed=2).requires_grad_()
    message = r"weight was quantized from a \[K, N\] tensor.*\[64, 20\].*Re-quantize from the weight as \[N, K\]"
    with pytest.warns(DeprecationWarning, match=message) as caught:
        y = bnbops.matmul_4bit(x, weight.packed, weight.state, bias=bias)
    assert caught[0].filename == __file__
    torch.testing.assert_close(y, x @ weight.values + bias)
    actual = torch.autograd.grad(y.sum(), (x, bias))
    expected = torch.autograd.grad((x @ weight.values + bias).sum(), (x, bias))
    torch.testing.assert_close(actual, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bnbops.matmul_4bit(normal(3, 20), weight.packed, weight.state)
        torch.compile(bnbops.matmul_4bit, backend="eager", fullgraph=True)(x, weight.packed, weight.state)


def test_matmul_has_gradients():
    weight, x, bias = Weight(20, 64), normal(3, 64).requires_grad_(), normal(20, seed=2).requires_grad_()
    actual = torch.autograd.grad(
        bnbops.matmul_4bit(x, weight.packed.t(), weight.state, bias=bias).tanh().sum(), (x, bias)
    )
    expected = torch.autograd.grad(weight.linear(x, bias).tanh().sum(), (x, bias))
    assert all(map(torch.equal, actual, expected))
    out = torch.empty(3, 20)
    bnbops.matmul_4bit(x, weight.packed, weight.state, out, bias).tanh().sum().backward()
    assert torch.equal(x.grad, expected[0])


def test_matmul_compiles():
    weight, x = Weight(20, 64, nested=True), normal(3, 64)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: bnbops.matmul_4bit(x, weight.packed, weight.state), backend="aot_eager", fullgraph=True
    )
    assert_equal(compiled(x), weight.linear(x))


def test_matmul_refuses():
    weight, x = Weight(20, 64), normal(3, 64)
    with pytest.raises(ValueError, match="needs the state that quantize_4bit returned"):
        bnbops.matmul_4bit(x, weight.packed, None)
    with pytest.raises(ValueError, match="needs the state that quantize_4bit returned"):
        F.gemv_4bit(x, weight.packed)
    experts = Weight(3, 20, 64)
    with pytest.raises(ValueError, match=r"state's shape is \[3, 20, 64\]; .*grouped_linear_4bit"):
        bnbops.matmul_4bit(x, experts.packed, experts.state)
    with pytest.raises(RuntimeError, match="in_features = 64"):
        bnbops.matmul_4bit(normal(3, 63), weight.packed, weight.state)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16, got int64"):
        bnbops.matmul_4bit(x.long(), weight.packed, weight.state)

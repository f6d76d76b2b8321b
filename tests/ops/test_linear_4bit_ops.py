"""Products with 4-bit weights: values and gradients."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import bnbops
from bnbops.functional import QuantState
from cases import backends
from cases.quantize_4bit import some_sizes, types
from cases.weights_4bit import DTYPES, Weight, assert_equal, normal, offsets_of, ops
from reference import quantize_4bit as ref

pytestmark = backends.on_every_backend

ROWS = (0, 1, 2, 5, 8, 9, 16, 17, 32, 33, 70)
SHAPES = [(64, 128), (33, 64), (1, 256), (48, 192), (50, 96), (7, 65), (3, 1), (16, 31)]  # [out, in]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ---- values ----------------------------------------------------------------------------------------------------


def check_values(rows_of_x: tuple[int, ...]) -> None:
    """Both directions over every dtype, size, tail and way to multiply, against float64."""
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        for blocksize, quant_type, nested in (
            (64, "nf4", False),
            (32, "fp4", True),
            (256, "nf4", True),
            (16, "int4", True),
        ):
            weight = Weight(*shape, blocksize=blocksize, quant_type=quant_type, nested=nested)
            for rows in rows_of_x:
                x, bias = normal(rows, shape[1], seed=1, dtype=dtype), normal(shape[0], seed=2, dtype=dtype)
                ref.assert_product(weight.linear(x), x, weight.values)
                ref.assert_product(weight.linear(x, bias), x, weight.values, bias)
                grad = normal(rows, shape[0], seed=3, dtype=dtype)
                ref.assert_product(weight.input_grad(grad), grad, weight.values.t())


def test_values():
    check_values(ROWS)


@dtypes
@pytest.mark.parametrize("rows", [1, 4, 16, 30, 200])
@types
def test_as_good_as_dequantizing(dtype, rows, quant_type):
    """No farther from the truth, in the mean, than torch's product with the weight rounded to the dtype."""
    weight = Weight(256, 512, quant_type=quant_type)
    x, grad = normal(rows, 512, seed=1, dtype=dtype), normal(rows, 256, seed=2, dtype=dtype)
    rounded, allowed = weight.values.to(dtype), 2 if dtype == torch.float32 else 1.05  # float32: other orders of adding

    def error(actual: Tensor, x: Tensor, w: Tensor) -> float:
        return (actual.double() - x.double() @ w.double()).norm().item()

    ours, theirs = error(weight.linear(x), x, weight.values.t()), error(linear(x, rounded), x, weight.values.t())
    assert ours <= allowed * theirs
    ours, theirs = error(weight.input_grad(grad), grad, weight.values), error(grad @ rounded, grad, weight.values)
    assert ours <= allowed * theirs


@some_sizes
@dtypes
def test_every_blocksize(blocksize, quant_type, dtype):
    """Blocks of a part of a row, of a row, of several rows."""
    weight = Weight(9, 512, blocksize=blocksize, quant_type=quant_type)
    for rows in (1, 3, 40):
        x, grad = normal(rows, 512, seed=1, dtype=dtype), normal(rows, 9, seed=2, dtype=dtype)
        ref.assert_product(weight.linear(x), x, weight.values)
        ref.assert_product(weight.input_grad(grad), grad, weight.values.t())


@pytest.mark.parametrize("storage", ref.STORAGE_DTYPES, ids=str)
def test_every_storage_from_guarded_memory(storage, guard):
    """All inputs begin at odd places."""
    weight, bias = Weight(24, 128), guard(normal(24, seed=2))
    packed, absmax = guard(weight.packed.view(-1).view(storage)), guard(weight.absmax)
    for rows in (1, 3, 40):
        x = guard(normal(rows, 128, seed=1))
        y = ops.linear_4bit(x, packed, absmax, bias, *weight.described)
        assert_equal(y, weight.linear(x.clone(), bias.clone()))


@dtypes
def test_leading_dimensions(dtype):
    weight, bias = Weight(20, 64), normal(20, dtype=dtype)
    x = normal(2, 3, 5, 64, seed=1, dtype=dtype)
    flat = weight.linear(x.view(30, 64), bias)
    assert_equal(weight.linear(x, bias), flat.view(2, 3, 5, 20))
    assert weight.linear(x[:, :0], bias).shape == (2, 0, 5, 20)
    one = weight.linear(x[0, 0, 0], bias)
    assert one.shape == (20,)
    ref.assert_product(one, x[0, 0, 0], weight.values, bias)
    grad = normal(2, 3, 20, dtype=dtype)
    assert_equal(weight.input_grad(grad), weight.input_grad(grad.view(6, 20)).view(2, 3, 64))
    assert weight.input_grad(grad[0, 0]).shape == (64,)


@dtypes
@pytest.mark.parametrize("rows", [3, 40])
def test_strided_activations(dtype, rows):
    weight = Weight(20, 64)
    wide = normal(rows, 128, seed=1, dtype=dtype)
    for x in (wide[:, ::2], wide[:, 3:67], normal(64, rows, seed=1, dtype=dtype).t(), wide[:1, :64].expand(rows, 64)):
        y = weight.linear(x)
        assert y.is_contiguous()
        assert_equal(y, weight.linear(x.contiguous()))
    assert_equal(weight.linear(wide[:, :1].expand(rows, 64)), weight.linear(wide[:, :1].repeat(1, 64)))
    for grad in (
        normal(rows, 40, dtype=dtype)[:, ::2],
        normal(20, rows, dtype=dtype).t(),
        normal(1, dtype=dtype).expand(rows, 20),
    ):
        result = weight.input_grad(grad)
        assert result.is_contiguous()
        ref.assert_product(result, grad, weight.values.t())
    strided_bias = normal(40, seed=4, dtype=dtype)[::2]
    ref.assert_product(weight.linear(wide[:, :64], strided_bias), wide[:, :64], weight.values, strided_bias)


@dtypes
@pytest.mark.parametrize("rows", [2, 12, 20, 50])
def test_what_is_not_finite_stays_in_its_row(dtype, rows):
    weight = Weight(20, 64)
    x = normal(rows, 64, seed=1, dtype=dtype)
    expected = weight.linear(x)
    x[0, 3], x[1, 5] = math.nan, math.inf
    y = weight.linear(x)
    assert y[0].isnan().all() and not y[1].isfinite().any()
    assert_equal(y[2:], expected[2:])


def test_products_without_terms():
    assert_equal(Weight(5, 64).linear(torch.empty(0, 64)), torch.empty(0, 5))
    empty, absmax = torch.empty(0, 1, dtype=torch.uint8), torch.empty(0)
    bias = normal(5)
    y = ops.linear_4bit(torch.empty(3, 0), empty, absmax, bias, [5, 0], 64, "nf4")
    assert_equal(y, bias.expand(3, 5))
    assert_equal(ops.linear_4bit(torch.empty(3, 0), empty, absmax, None, [5, 0], 64, "nf4"), torch.zeros(3, 5))
    assert_equal(ops.linear_4bit(torch.ones(3, 5), empty, absmax, None, [0, 5], 64, "nf4"), torch.empty(3, 0))
    assert_equal(ops.linear_4bit_input_grad(torch.empty(3, 0), empty, absmax, [0, 5], 64, "nf4"), torch.zeros(3, 5))


# ---- bitsandbytes' golden files --------------------------------------------------------------------------------


GOLDEN = [
    f"{quant_type}_{statistics}_{file}"
    for quant_type in ("nf4", "fp4")
    for statistics in ("sq", "dq")
    for file in ("33x65_float32", "33x65_bfloat16", "100x64_bfloat16")
]


@pytest.mark.parametrize("name", [*GOLDEN, "nf4_dq_256x128_float32"])
def test_golden_forward_and_gradient(name, golden):
    """Of sum(y^2), as bitsandbytes computed them, within the dtype's rounding."""
    g, prefix = golden(f"w4_{name}.safetensors"), "state_dict.weight."
    state = QuantState.from_dict({k.removeprefix(prefix): v for k, v in g.items() if prefix in k}, device="cpu")
    weight = g["out.dequantized"].float()
    x = g["in.x"].requires_grad_()
    y = bnbops.matmul_4bit(x, g["state_dict.weight"], state, bias=g["in.bias"])
    y.float().square().sum().backward()
    for actual, expected in ((y, g["out.forward_train"]), (x.grad, g["out.grad_x"])):
        unit = torch.finfo(actual.dtype).eps
        off, largest = (actual - expected).abs().max(), expected.abs().max()
        assert off <= (16 if actual.dtype == torch.float32 else 2) * unit * largest
    ref.assert_product(y.detach(), x.detach(), weight, g["in.bias"])
    ref.assert_product(x.grad, (2 * y.detach().float()).to(x.dtype), weight.t())


# ---- gradients -------------------------------------------------------------------------------------------------


def gradients(weight: Weight, x: Tensor, bias: Tensor | None, upstream: Tensor, dense: bool) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    y = linear(inputs[0], weight.values.to(x.dtype), *inputs[1:]) if dense else weight.linear(*inputs)
    return list(torch.autograd.grad((y * upstream).sum(), inputs))


@dtypes
@pytest.mark.parametrize("rows", [(3,), (40,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_gradients_are_those_of_the_dense_layer(dtype, rows, nested):
    weight = Weight(20, 96, nested=nested)
    x, bias, upstream = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate(((*rows, 96), (20,), (*rows, 20))))
    ours = gradients(weight, x, bias, upstream, dense=False)
    for a, b in zip(ours, gradients(weight, x, bias, upstream, dense=True), strict=True):
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    ref.assert_product(ours[0], upstream, weight.values.t())
    assert len(gradients(weight, x, None, upstream, dense=False)) == 1


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_gradcheck():
    """Against finite differences, twice. The operators are linear: a coarse step is exact."""
    weight, bias = Weight(6, 32, blocksize=32), normal(6, seed=2).requires_grad_()
    x, grad = normal(3, 32, seed=1).requires_grad_(), normal(3, 6, seed=3).requires_grad_()
    tolerances = {"eps": 0.0625, "atol": 1e-4, "rtol": 1e-4}
    for function, inputs in ((weight.linear, (x, bias)), (weight.input_grad, (grad,))):
        assert torch.autograd.gradcheck(function, inputs, **tolerances)
        assert torch.autograd.gradgradcheck(function, inputs, **tolerances)


def test_only_what_is_asked_for_is_differentiated():
    weight, x, bias = Weight(20, 64), normal(3, 64).requires_grad_(), normal(20).requires_grad_()
    (grad_bias,) = torch.autograd.grad(weight.linear(x.detach(), bias).sum(), bias)
    assert_equal(grad_bias, torch.full((20,), 3.0))
    (grad_x,) = torch.autograd.grad(weight.linear(x, bias.detach()).sum(), x)
    torch.testing.assert_close(grad_x, weight.values.sum(0).expand(3, 64))
    assert not weight.linear(x.detach(), bias.detach()).requires_grad
    with torch.no_grad():
        assert not weight.linear(x, bias).requires_grad
    with torch.inference_mode():
        assert weight.linear(x, bias).is_inference()


def test_the_gradient_of_bias_is_summed_in_float32():
    """In bfloat16, 300 ones would add up to 256."""
    weight = Weight(4, 64)
    bias = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    weight.linear(normal(300, 64, dtype=torch.bfloat16), bias).sum().backward()
    assert_equal(bias.grad, torch.full((4,), 300.0).bfloat16())


def test_nothing_large_is_saved():
    """For backward the packed weight and its scales are kept, neither activations nor the decoded weight."""
    weight, saved = Weight(64, 128, nested=True), []
    x, bias = normal(50, 128).requires_grad_(), normal(64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        weight.linear(x, bias)
    owners = {t.data_ptr() for t in (weight.packed, weight.absmax, *weight.nested.values())}
    assert {t.data_ptr() for t in saved} == owners


def test_a_weight_changed_before_backward_is_noticed():
    weight, x = Weight(4, 64), normal(3, 64).requires_grad_()
    y = weight.linear(x).sum()
    weight.packed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant):
    weight = Weight(64, 64)

    def grads(checkpointed: bool) -> tuple[Tensor, Tensor]:
        x, bias = normal(5, 64, seed=1).requires_grad_(), normal(64).requires_grad_()

        def layer(x: Tensor) -> Tensor:
            return weight.linear(x, bias).tanh()

        y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        y.sum().backward()
        return x.grad, bias.grad

    assert all(map(torch.equal, grads(True), grads(False)))


# ---- direct calls with nonsense --------------------------------------------------------------------------------

GOOD = Weight(10, 64)
EXPERTS = Weight(3, 10, 64)


def good(op: str) -> dict[str, Any]:
    grouped, backward = op.startswith("grouped"), op.endswith("input_grad")
    weight = EXPERTS if grouped else GOOD
    shape, blocksize, quant_type = weight.described
    arguments: dict[str, Any] = {"grad" if backward else "x": normal(5, 10 if backward else 64)}
    arguments |= {"weight": weight.packed, "absmax": weight.absmax}
    arguments |= {} if backward else {"bias": normal(*shape[:-1])}
    arguments |= {"offsets": offsets_of([1, 3, 5])} if grouped else {}
    return arguments | {"shape": shape, "blocksize": blocksize, "quant_type": quant_type}


LINEAR, GROUPED = "linear_4bit", "grouped_linear_4bit"
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "x float64": (LINEAR, {"x": torch.zeros(5, 64).double()}, "x must be float32, bfloat16 or float16, got float64"),
    "x too wide": (LINEAR, {"x": torch.zeros(5, 65)}, r"x has shape \[5, 65\], .* in_features = 64 .* \[10, 64\]"),
    "x transposed": (LINEAR, {"x": torch.zeros(64, 5)}, r"x has shape \[64, 5\]"),
    "x a scalar": (LINEAR, {"x": torch.zeros(())}, r"x has shape \[\]"),
    "grad too wide": (f"{LINEAR}_input_grad", {"grad": torch.zeros(5, 64)}, "must be out_features = 10"),
    "bias of another dtype": (LINEAR, {"bias": torch.zeros(10).half()}, "bias must be float32, got float16"),
    "bias too short": (LINEAR, {"bias": torch.zeros(9)}, r"bias must have shape \[10\], got \[9\]"),
    "bias a row": (LINEAR, {"bias": torch.zeros(1, 10)}, r"bias must have shape \[10\], got \[1, 10\]"),
    "shape of a vector": (LINEAR, {"shape": [640]}, "shape must have 2 dimensions"),
    "shape of experts": (LINEAR, {"shape": [1, 10, 64]}, "shape must have 2 dimensions"),
    "weight too short": (LINEAR, {"weight": GOOD.packed[:-1]}, "weight has 319 bytes, but shape .10, 64. needs 320"),
    "absmax too short": (LINEAR, {"absmax": GOOD.absmax[:-1]}, "absmax has 9 elements"),
    "absmax in bytes": (
        LINEAR,
        {"absmax": torch.zeros(10, dtype=torch.uint8)},
        "absmax must be float32, or int32 .* got uint8",
    ),
    "nested_code alone": (LINEAR, {"nested_code": torch.zeros(256)}, "go together"),
    "blocksize": (LINEAR, {"blocksize": 100}, "power of two"),
    "type": (LINEAR, {"quant_type": "int5"}, "quant_type must be 'nf4' or 'fp4'"),
    "x of three dimensions": (GROUPED, {"x": torch.zeros(5, 1, 64)}, "x must be a matrix .tokens, features., got"),
    "shape of a matrix": (GROUPED, {"shape": [30, 64]}, "shape must have 3 dimensions"),
    "bias of one expert": (GROUPED, {"bias": torch.zeros(10)}, r"bias must have shape \[3, 10\], got \[10\]"),
    "int64 offsets": (GROUPED, {"offsets": torch.tensor([1, 3, 5])}, "offsets must be int32, got int64"),
    "too few offsets": (GROUPED, {"offsets": offsets_of([1, 5])}, r"offsets must have shape \[3\]"),
    "offsets of a matrix": (f"{GROUPED}_input_grad", {"offsets": offsets_of([1, 3, 5])[:, None]}, "offsets must have"),
}


@pytest.mark.parametrize("case", BAD)
def test_nonsense_is_refused(case):
    op, changed, match = BAD[case]
    with pytest.raises(RuntimeError, match=f"bnbops::{op}: .*{match}"):
        getattr(ops, op)(**good(op) | changed)
    getattr(ops, op)(**good(op))  # what was changed was all that was wrong

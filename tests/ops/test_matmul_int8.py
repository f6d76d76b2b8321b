"""bnbops.matmul and MatmulLtState: LLM.int8 products, their gradients, and what a state does. Reference: plain fp32."""

import pytest
import torch
from torch import Tensor

from bnbops import MatmulLtState, matmul
from bnbops.nn import Int8Params

INVERSE_127_SQUARED = 1 / 127**2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
thresholds = pytest.mark.parametrize("threshold", [0.0, 3.0])


def tensors(dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (7,)) -> tuple[Tensor, Tensor, Tensor]:
    """Activations [*rows, 40] with outliers, a weight [24, 40] and a bias."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(*rows, 40, generator=generator)
    A[..., 5] *= 9
    return A.to(dtype), torch.randn(24, 40, generator=generator), torch.randn(24, generator=generator)


def quantized(A: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows."""
    scales = A.abs().amax(-1)
    return torch.round(A * (127 / scales).unsqueeze(-1)), scales


def reference(A: Tensor, B: Tensor, bias: Tensor, threshold: float) -> Tensor:
    """Section 3 of the paper in fp32: int8 codes for all columns without an outlier, floats for the others."""
    rows = A.float().reshape(-1, A.shape[-1])
    outliers = rows.abs() >= threshold if threshold else torch.zeros_like(rows, dtype=torch.bool)
    codes, scales = quantized(rows.masked_fill(outliers, 0))
    columns = outliers.any(0)
    codes[:, columns] = 0
    weight_codes, weight_scales = quantized(B.half().float())
    product = (codes @ weight_codes.T) * (scales.unsqueeze(1) * weight_scales * INVERSE_127_SQUARED)
    weight = weight_codes * (weight_scales / 127).unsqueeze(1)
    result = product + rows[:, columns] @ weight[:, columns].T + bias.to(A.dtype).float()
    return result.view(*A.shape[:-1], -1)


def inference(**options) -> MatmulLtState:
    return MatmulLtState(is_training=False, **options)


def int8(B: Tensor) -> Int8Params:
    return Int8Params(B, requires_grad=False).to("cpu")


# ---- products --------------------------------------------------------------------------------------------------


@dtypes
@thresholds
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("rows", [(7,), (1,), (2, 3), ()], ids=str)
def test_product(dtype, threshold, rows, is_training):
    """In training on a CPU every column is multiplied in floating point, whatever the threshold."""
    A, B, bias = tensors(dtype, rows)
    result = matmul(A, B, state=MatmulLtState(is_training=is_training), threshold=threshold, bias=bias)
    assert result.dtype == dtype and result.shape == (*rows, 24)
    unit = max(torch.finfo(dtype).eps, 1e-6)
    expected = reference(A, B, bias, 1e-30 if is_training else threshold)
    torch.testing.assert_close(result.float(), expected, rtol=4 * unit, atol=4 * unit)


def test_accuracy_is_that_of_bitsandbytes():
    """Relative errors of bitsandbytes 0.50.2 on a CPU, on these numbers: 0.00692 in training, 0.01013 in inference."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(64, 256, generator=generator), torch.randn(128, 256, generator=generator)
    A[:, [3, 50]] *= 10
    exact = A.double() @ B.double().T
    for is_training, error in ((True, 0.00692), (False, 0.01013)):
        state = MatmulLtState(has_fp16_weights=False, threshold=6.0, is_training=is_training)
        off = (matmul(A, B, state=state) - exact).norm() / exact.norm()
        assert abs(off - error) < 2e-5


def test_threshold_saves_the_small_columns():
    """What the decomposition is for: a large outlier costs all other columns their precision."""
    A, B, _ = tensors()
    A[0, 5] = 1000
    codes, scales = quantized(B.half().float())
    expected = A @ (codes * (scales / 127).unsqueeze(1)).T
    errors = [(matmul(A, B, state=inference(threshold=t)) - expected)[0].abs().max() for t in (0.0, 6.0)]
    assert errors[1] < errors[0] / 100


@thresholds
def test_the_forms_of_a_weight_agree(threshold):
    """A float weight, its codes with scales of their own or in a state, and a state that quantized it before."""
    A, B, bias = tensors()
    weight = int8(B)
    expected = matmul(A, B, threshold=threshold, bias=bias)
    state = MatmulLtState(SCB=weight.SCB)
    assert torch.equal(matmul(A, weight, threshold=threshold, bias=bias), expected)
    assert torch.equal(matmul(A, weight.CB, state=state, threshold=threshold, bias=bias), expected)
    state = MatmulLtState(threshold=threshold, has_fp16_weights=False)
    assert torch.equal(matmul(A, B, state=state, bias=bias), expected)
    assert torch.equal(state.CB, weight.CB) and torch.equal(state.SCB, weight.SCB)
    for ignored in (torch.zeros_like(B), weight.CB.t(), weight):  # the codes are kept
        assert torch.equal(matmul(A, ignored, state=state, bias=bias), expected)
    state.reset_grads()
    assert state.CB is None and state.SCB is None


def test_a_positive_threshold_goes_before_the_states():
    A, B, bias = tensors()
    state, one, three = (inference(threshold=t) for t in (3.0, 1.0, 3.0))
    assert torch.equal(matmul(A, B, state=state, bias=bias), matmul(A, B, state=three, bias=bias))
    assert torch.equal(matmul(A, B, state=state, threshold=1.0, bias=bias), matmul(A, B, state=one, bias=bias))
    assert (state.threshold, state.CB, state.SCB) == (3.0, None, None)


def test_strides_do_not_matter():
    A, B, bias = tensors()
    expected = matmul(A, B, bias=bias)
    assert torch.equal(matmul(A.T.contiguous().T, B.T.contiguous().T, bias=bias.repeat(2)[:24]), expected)
    padded = torch.zeros(7, 80)
    padded[:, ::2] = A
    assert torch.equal(matmul(padded[:, ::2], B, bias=bias), expected)


def test_out():
    A, B, bias = tensors()
    out = torch.empty(7, 24)
    assert matmul(A, B, out, bias=bias) is out
    assert torch.equal(out, matmul(A, B, bias=bias))


def test_no_rows():
    A, B, bias = tensors(rows=(0,))
    A, B, bias = (x.requires_grad_() for x in (A, B, bias))
    result = matmul(A, B, threshold=6.0, bias=bias)
    result.sum().backward()
    assert result.shape == (0, 24) and A.grad.shape == A.shape
    assert not B.grad.any() and not bias.grad.any()


# ---- gradients -------------------------------------------------------------------------------------------------


@dtypes
@thresholds
@pytest.mark.parametrize("rows", [(7,), (2, 3), ()], ids=str)
def test_gradients_of_a_float_weight(dtype, threshold, rows):
    """grad_A = grad @ dequantized(B), grad_B = grad.T @ A, whatever the threshold."""
    A, B, bias = (x.requires_grad_() for x in tensors(dtype, rows))
    result = matmul(A, B, threshold=threshold, bias=bias)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    result.backward(grad)

    codes, scales = quantized(B.detach().half().float())
    by_rows = grad.float().reshape(-1, 24)
    expected = {
        "A": (grad.float() @ (codes * (scales / 127).unsqueeze(1)), A),
        "B": (by_rows.T @ A.detach().float().reshape(-1, 40), B),
        "bias": (by_rows.sum(0), bias),
    }
    tolerance = 4 * max(torch.finfo(dtype).eps, 1e-6)
    for name, (value, tensor) in expected.items():
        assert tensor.grad.dtype == tensor.dtype and tensor.grad.shape == tensor.shape, name
        torch.testing.assert_close(tensor.grad.float(), value, rtol=tolerance, atol=8 * tolerance)


def test_gradients_of_a_quantized_weight():
    """Those of a float weight, but none for the weight."""
    A, B, bias = tensors()
    grads = []
    for weight in (B.clone().requires_grad_(), int8(B)):
        a, b = A.clone().requires_grad_(), bias.clone().requires_grad_()
        matmul(a, weight, threshold=3.0, bias=b).square().sum().backward()
        grads.append((a.grad, b.grad))
        assert (weight.grad is None) == (weight.dtype == torch.int8)
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("wanted", range(3))
def test_one_gradient_alone(wanted):
    every, one = tensors(), tensors()
    for x in every:
        x.requires_grad_()
    one[wanted].requires_grad_()
    for A, B, bias in (every, one):
        matmul(A, B, bias=bias).square().sum().backward()
    assert torch.equal(one[wanted].grad, every[wanted].grad)


def test_a_second_derivative_through_a_float_weight_is_refused():
    A, B, _ = (x.requires_grad_() for x in tensors())
    (grad,) = torch.autograd.grad(matmul(A, B).square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_weight_changed_before_the_backward_is_noticed():
    A, B, _ = (x.requires_grad_() for x in tensors())
    result = matmul(A, B)
    with torch.no_grad():
        B.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_autocast():
    """Activations are cast to autocast's dtype; gradients come back in the tensors' own."""
    A, B, bias = tensors()
    expected = matmul(A.bfloat16(), B, threshold=3.0, bias=bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matmul(A, B, threshold=3.0, bias=bias), expected)
        assert matmul(A.half(), B).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="float64"):
            matmul(A.double(), B)
        a = A.clone().requires_grad_()
        matmul(a, B).float().sum().backward()
    assert a.grad.dtype == torch.float32


# ---- bad input -------------------------------------------------------------------------------------------------


def test_bad_input():
    A, B, bias = tensors()
    codes = int8(B).CB
    cases = [
        (RuntimeError, "last dimensions must be equal", lambda: matmul(A[:, :39], B)),
        (RuntimeError, "float32, bfloat16 or float16, got float64", lambda: matmul(A.double(), B)),
        (RuntimeError, "two dimensions", lambda: matmul(A, B[0])),
        (RuntimeError, r"bias must have shape \[24\]", lambda: matmul(A, B, bias=bias[:23])),
        (ValueError, "threshold", lambda: matmul(A, B, state=MatmulLtState(threshold=-1.0))),
        (RuntimeError, "scalar", lambda: matmul(A[0, 0], B)),
        (ValueError, "neither B.SCB nor state.SCB", lambda: matmul(A, codes)),
        (RuntimeError, "23 elements", lambda: matmul(A, codes, state=MatmulLtState(SCB=torch.ones(23)))),
        (ValueError, r"out has shape \[7, 23\]", lambda: matmul(A, B, torch.empty(7, 23))),
        (ValueError, "out has shape .* torch.float16", lambda: matmul(A, B, torch.empty(7, 24).half())),
        (ValueError, "no gradient", lambda: matmul(A.requires_grad_(), B, torch.empty(7, 24))),
        (
            ValueError,
            "has_fp16_weights=True",
            lambda: matmul(A, B.requires_grad_(), state=MatmulLtState(has_fp16_weights=False)),
        ),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_special_activations():
    """A NaN counts as zero and an infinity as the largest float: no other row is touched. In training they stay."""
    A, B, _ = tensors()
    special = A.clone()
    special[0, 1], special[2, 1] = float("nan"), float("inf")
    others, state = [1, 3, 4, 5, 6], inference()
    result, expected = matmul(special, B, state=state), matmul(A, B, state=state)
    assert torch.equal(result[others], expected[others])
    assert torch.equal(result[0], matmul(special[:1].nan_to_num(0), B, state=state)[0]) and not result.isnan().any()
    assert torch.equal(matmul(special, B).isfinite().all(1), torch.tensor([i in others for i in range(7)]))

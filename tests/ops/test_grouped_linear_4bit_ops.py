"""Products with the 4-bit weights of several experts."""

import math

import pytest
import torch

from cases import backends
from cases.weights_4bit import DTYPES, Weight, assert_equal, normal, offsets_of
from reference import quantize_4bit as ref

ENDS = [[2, 4, 7], [0, 0, 9], [5, 5, 5], [0, 0, 0], [1, 41, 90]]


@backends.on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize(
    ("shape", "quant_type"), [((3, 20, 64), "nf4"), ((3, 9, 35), "nf4"), ((3, 9, 35), "int4")], ids=str
)
def test_experts_are_linear_layers(ends, shape, quant_type, dtype):
    """Also where an expert's codes begin within a byte and its block within another's."""
    weight = Weight(*shape, nested=shape[1] == 20, quant_type=quant_type)
    offsets, tokens = offsets_of(ends), ends[-1] + 2
    x, bias = normal(tokens, shape[2], seed=1, dtype=dtype), normal(*shape[:2], seed=2, dtype=dtype)
    grad = normal(tokens, shape[1], seed=3, dtype=dtype)
    biased, plain, back = (
        weight.grouped(x, offsets, bias),
        weight.grouped(x, offsets),
        weight.grouped_input_grad(grad, offsets),
    )
    start = 0
    for expert, end in enumerate(ends):
        rows, values = slice(start, end), weight.values[expert]
        ref.assert_product(biased[rows], x[rows], values, bias[expert])
        ref.assert_product(plain[rows], x[rows], values)
        ref.assert_product(back[rows], grad[rows], values.t())
        start = end
    assert biased.shape == (tokens, shape[1]) and back.shape == (tokens, shape[2])
    assert not biased[start:].any() and not plain[start:].any() and not back[start:].any()
    with torch.no_grad():
        x[start:] = math.nan  # what belongs to no expert is not even looked at
    assert_equal(weight.grouped(x, offsets, bias), biased)


@backends.on_every_backend
@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_gradients_of_experts(ends):
    weight, offsets, tokens = Weight(3, 20, 64), offsets_of(ends), ends[-1] + 2
    x, bias = normal(tokens, 64, seed=1).requires_grad_(), normal(3, 20, seed=2).requires_grad_()
    upstream = normal(tokens, 20, seed=3)
    actual = torch.autograd.grad((weight.grouped(x, offsets, bias) * upstream).sum(), (x, bias))
    expert = (torch.arange(tokens)[:, None] >= offsets).sum(1)
    values = torch.cat([weight.values, torch.zeros(1, 20, 64)])[expert]
    biases = torch.cat([bias, torch.zeros(1, 20)])[expert]
    dense = (values @ x.unsqueeze(2)).squeeze(2) + biases
    expected = torch.autograd.grad((dense * upstream).sum(), (x, bias))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@backends.on_every_backend
@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_gradcheck_of_experts():
    weight, offsets = Weight(2, 4, 32, blocksize=32), offsets_of([2, 3])
    x, bias = normal(4, 32, seed=1).requires_grad_(), normal(2, 4, seed=2).requires_grad_()
    grad, tolerances = normal(4, 4, seed=3).requires_grad_(), {"eps": 0.0625, "atol": 1e-4, "rtol": 1e-4}
    for function, inputs in (
        (lambda x, bias: weight.grouped(x, offsets, bias), (x, bias)),
        (lambda grad: weight.grouped_input_grad(grad, offsets), (grad,)),
    ):
        assert torch.autograd.gradcheck(function, inputs, **tolerances)
        assert torch.autograd.gradgradcheck(function, inputs, **tolerances)


@pytest.mark.parametrize("ends", [[2, 1, 7], [2, 4, 8], [-1, 4, 7], [8, 8, 8]], ids=str)
def test_impossible_offsets_are_refused(ends):
    """... by the CPU, which can read them. Other devices stay in bounds."""
    weight = Weight(3, 20, 64)
    with pytest.raises(RuntimeError, match=r"grouped_linear_4bit: offsets must not decrease and not exceed the 7 rows"):
        weight.grouped(normal(7, 64), offsets_of(ends))
    with pytest.raises(RuntimeError, match=r"grouped_linear_4bit_input_grad: offsets must not decrease"):
        weight.grouped_input_grad(normal(7, 20), offsets_of(ends))

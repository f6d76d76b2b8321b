"""Products with 4-bit weights under autocast, torch.func, torch.compile and torch.export."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.forward_ad import dual_level, make_dual

from cases.weights_4bit import DTYPES, Weight, assert_equal, normal, offsets_of, ops


@pytest.mark.parametrize("low", DTYPES[1:], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(low, compiled):
    """x and bias are cast as torch's linear layer casts them; gradients come back in their own dtype."""
    weight, offsets = Weight(20, 64), offsets_of([1, 3, 4])
    experts = Weight(3, 20, 64)

    def layers(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight.linear(x, bias), experts.grouped(x, offsets, bias.expand(3, 20))

    torch._dynamo.reset()
    call = torch.compile(layers, backend="aot_eager", fullgraph=True) if compiled else layers
    x, bias = normal(4, 64).requires_grad_(), normal(20).requires_grad_()
    with torch.autocast("cpu", dtype=low):
        one, several = call(x, bias)
        assert_equal(weight.linear(x.to(low)), weight.linear(x))
    assert_equal(one, weight.linear(x.to(low), bias.to(low)))
    assert_equal(several, experts.grouped(x.to(low), offsets, bias.to(low).expand(3, 20)))
    (one.float().sum() + several.float().sum()).backward()
    assert x.grad.dtype == bias.grad.dtype == torch.float32
    assert_equal(bias.grad, torch.full((20,), 8.0))
    with torch.autocast("cpu", dtype=low, enabled=False):
        assert weight.linear(x).dtype == torch.float32


def test_transforms_are_refused():
    """By name. torch would run vmap in a loop, and let jvp answer zero."""
    weight, x = Weight(20, 64), normal(3, 64)
    experts, offsets = Weight(3, 20, 64), offsets_of([1, 2, 3])
    with pytest.raises(RuntimeError, match="linear_4bit: vmap is not supported; it takes a batch of any size"):
        torch.vmap(weight.linear)(x)
    with pytest.raises(RuntimeError, match="linear_4bit_input_grad: vmap is not supported"):
        torch.vmap(weight.input_grad)(normal(3, 20))
    with pytest.raises(RuntimeError, match="grouped_linear_4bit: vmap is not supported"):
        torch.vmap(lambda x: experts.grouped(x, offsets))(normal(2, 3, 64))
    for transform in (
        lambda: torch.func.grad(lambda x: weight.linear(x).sum())(x),
        lambda: torch.func.jvp(weight.linear, (x,), (x,)),
        lambda: torch.func.vjp(weight.linear, x),
        lambda: torch.func.jacrev(weight.linear)(x[0]),
    ):
        with pytest.raises(RuntimeError, match=r"grad, vjp and jvp are not supported; use torch\.autograd\.grad"):
            transform()
    with dual_level(), pytest.raises(RuntimeError, match="jvp are not supported"):
        weight.linear(make_dual(x, x))
    untouched = torch.func.grad(lambda s: (s * weight.linear(x).sum()).sum())(torch.ones(2))
    assert_equal(untouched, weight.linear(x).sum().expand(2))


@pytest.mark.every_torch
@pytest.mark.parametrize("nested", [False, True])
def test_one_graph_for_every_batch(nested):
    """Forward and backward are compiled once for batches that change (sizes 0 and 1 are torch's own exceptions)."""
    weight, bias = Weight(20, 64, nested=nested), normal(20).requires_grad_()
    experts = Weight(3, 20, 64, nested=nested)
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, offsets: Tensor) -> Tensor:
        return (weight.linear(x, bias).tanh() * experts.grouped(x, offsets)).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 2, 40, 17):
        x, offsets = normal(rows, 64, seed=rows).requires_grad_(), offsets_of([1, 2, rows])
        actual = torch.autograd.grad(compiled(x, offsets), (x, bias))
        assert all(map(torch.equal, actual, torch.autograd.grad(loss(x, offsets), (x, bias))))
    assert counter.frame_count == 1


@pytest.mark.every_torch
def test_export_keeps_a_dynamic_batch():
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = Weight(20, 64)
            self.described = weight.described
            self.register_buffer("packed", weight.packed)
            self.register_buffer("absmax", weight.absmax)

        def forward(self, x: Tensor) -> Tensor:
            return ops.linear_4bit(x, self.packed, self.absmax, None, *self.described)

    layer = Layer()
    program = torch.export.export(layer, (normal(5, 64),), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    x = normal(77, 64, seed=1)
    assert_equal(program.module()(x), layer(x))


@pytest.mark.every_torch
def test_fakes_hold_no_data():
    """A fake kernel that computed something would fail here."""
    with FakeTensorMode():
        size = 1 << 20  # a weight of 512 GiB
        packed, absmax = torch.empty(size * size // 2, dtype=torch.uint8), torch.empty(size * size // 4096)
        y = ops.linear_4bit(torch.empty(3, size), packed, absmax, None, [size, size], 4096, "nf4")
        assert y.shape == (3, size)

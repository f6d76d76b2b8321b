"""torch.jit.trace of quantized layers, and the views of scales that it could not record: there are none."""

import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cases.quantize_model import quantize_
from cases.quantized import EMBEDDINGS, IN, LINEARS, TOKENS, features, quantized

pytestmark = [pytest.mark.every_torch, pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")]


def _experts() -> nn.Module:
    """A model that `quantize_` has gone through."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, IN, IN))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.up[0] + x @ self.up[1]

    return quantize_(nn.Sequential(nn.Linear(IN, IN), Experts(), nn.Linear(IN, 8)), "nf4", double_quant=False)


CASES = {
    **{name: (lambda make=make: quantized(make), features(3), features(5)) for name, make in LINEARS.items()},
    **{
        f"embedding, {name}": (
            lambda make=make: quantized(make, torch.float32),
            torch.tensor([[0, 3], [TOKENS - 1, 0]]),
            torch.tensor([[5], [7]]),
        )
        for name, make in EMBEDDINGS.items()
    },
    "quantize_": (lambda: _experts(), features(3), features(5)),
}
SHAPES = {"experts", "experts nested"}  # they compute how many rows each expert gets, which a trace records as it was


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", CASES)
def test_a_trace_computes_the_same(name, grad):
    """Also what has been saved and loaded, but for a float weight, whose gradient is written in Python."""
    make, example, other = CASES[name]
    module = make()
    other = example.flip(0) if name in SHAPES else other
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, example)
        assert torch.equal(traced(other), module(other))
        if name != "int8 of a float weight":
            file = io.BytesIO()
            torch.jit.save(traced, file)
            file.seek(0)
            assert torch.equal(torch.jit.load(file)(other), module(other))


@pytest.mark.parametrize("name", CASES)
def test_a_forward_views_no_scales(name):
    """They are in the dtype that the operators take: a view costs more time than a small product."""
    make, example, _ = CASES[name]
    module, called = make(), []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    with Recording():
        module(example)
    assert any(func.namespace == "bnbops" for func in called)
    assert torch.ops.aten.view.dtype not in called

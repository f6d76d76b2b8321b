"""Operators, layers and optimizers on CUDA kernels: right, of the CPU's bits, near to dense layers, compiled.

On a GPU's kernels (`--backends cuda`) this is what a new GPU is asked first; the simulator's show that the tests are
right.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import bnbops as bnb
import bnbops.functional as F
from bnbops._library import device_operators
from bnbops.nn import Linear4bit, Linear8bitLt
from bnbops.nn.parametrize import replace_parameter_4bit
from bnbops.testing import self_check
from bnbops.testing.samples import operator, samples
from cases import backends
from cases.backends import OnCuda
from cases.compiled import batches, make_model, usual_step
from cases.optimizer_classes import WITH_8BIT, build
from cases.optimizers import MIXED, assert_same, flat_state, params, train
from reference.quantize_4bit import assert_product

DTYPES = [torch.float32, torch.bfloat16]
# Sums in another order than the CPU's, and AdEMAMix's schedules, whose logarithms the device computes.
OTHER_BITS = ("linear_4bit", "grouped_linear_4bit", "linear_int8", "ademamix_step_")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ---- operators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", device_operators())
def test_self_check(name, on_cuda):
    with on_cuda.kernels():
        found = samples(name, on_cuda.device)
        assert [problem for sample in found if (problem := self_check.check(name, sample))] == []


@pytest.mark.parametrize("name", [name for name in device_operators() if not name.startswith(OTHER_BITS)])
def test_same_bits_as_the_cpu(name, on_cuda):
    kernel = (backends.on_gpu if on_cuda.backend == "cuda" else backends.simulated)()[name]
    for sample in samples(name):
        here, there = sample.map(Tensor.detach).clone(), sample.map(Tensor.detach).clone()
        expected = [here.run(operator(name)), here.args, here.kwargs]
        actual = [there.run(kernel), there.args, there.kwargs]
        for a, b in zip(tensors(actual), tensors(expected), strict=True):
            assert torch.equal(raw(a), raw(b)), sample.name


def tensors(values: object) -> list[Tensor]:
    return [x.detach() for x in tree_leaves(values) if isinstance(x, Tensor)]


def raw(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


# ---- layers ----------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dtypes
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", False), ("nf4", True), ("fp4", True), ("int4", True)])
def test_linear_4bit_is_a_dense_layer(quant_type, nested, rows, dtype, on_cuda: OnCuda):
    """Forward and backward: the dense layer of the values that its codes stand for."""
    torch.manual_seed(0)
    layer = Linear4bit(128, 96, compute_dtype=dtype, compress_statistics=nested, quant_type=quant_type)
    x = normal(rows, 128, seed=1, dtype=dtype).to(on_cuda.device).requires_grad_()
    grad = normal(rows, 96, seed=2, dtype=dtype)
    with on_cuda.kernels():
        layer = layer.to(on_cuda.device)
        y = layer(x)
        y.backward(grad.to(on_cuda.device))
        weight = F.dequantize_4bit(layer.weight.data, layer.quant_state).float().cpu()
    assert_product(y.detach().cpu(), x.detach().cpu(), weight, layer.bias.detach().to(dtype).cpu())
    assert_product(x.grad.cpu(), grad, weight.t())


@dtypes
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_linear_8bit_is_nearly_a_dense_layer(threshold, dtype, on_cuda: OnCuda):
    """Within what rounding inputs and weights to int8 costs; with columns of outliers, where there is a threshold."""
    torch.manual_seed(0)
    dense = nn.Linear(128, 96)
    layer = Linear8bitLt(128, 96, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(dense.state_dict())
    x = normal(40, 128, seed=1, dtype=dtype)
    x[:, ::50] *= 9 if threshold else 1
    with on_cuda.kernels():
        y = layer.to(on_cuda.device)(x.to(on_cuda.device)).detach().cpu()
    expected = dense(x.float()).detach()
    assert y.dtype == dtype and (y.float() - expected).norm() / expected.norm() < 0.02


class Experts(nn.Module):
    """Linear layers, one for each group of rows, whose weights are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(4, 48, 64, seed=0, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.transpose(1, 2)


@pytest.mark.parametrize("nested", [False, True])
def test_experts_are_dense_layers(nested, on_cuda: OnCuda):
    here, there = Experts(), Experts().to(on_cuda.device)
    x = normal(4, 5, 64, seed=1, dtype=torch.float32)
    replace_parameter_4bit(here, "weight", compress_statistics=nested, quant_type="nf4")
    with on_cuda.kernels():
        replace_parameter_4bit(there, "weight", compress_statistics=nested, quant_type="nf4")
        weight, y = there.weight.cpu(), there(x.to(on_cuda.device)).cpu()
    assert torch.equal(weight, here.weight)
    assert_close(y, here(x), rtol=1e-4, atol=1e-4)


# ---- optimizers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", WITH_8BIT)
def test_optimizers_step_as_on_the_cpu(name, bits, on_cuda: OnCuda):
    """Parameters and states have the CPU's bits after three steps, also where all gradients are clipped."""
    options = {"optim_bits": bits, "percentile_clipping": 50}
    here, there = params(*MIXED), [nn.Parameter(p.detach().to(on_cuda.device)) for p in params(*MIXED)]
    expected, optimizer = build(name, here, **options), build(name, there, **options)
    train(here, expected, range(3))
    with on_cuda.kernels():
        train(there, optimizer, range(3))
    there = [p.detach().cpu() for p in there]
    if name == "AdEMAMix":  # another bit may round a code to its neighbour, a hundredth of a step away
        for a, b in zip(there, here, strict=True):
            assert_close(a, b.detach(), rtol=1e-5, atol=1e-4 if bits == 8 else 1e-6)
        return
    assert_same(there, here)
    states, wanted = flat_state(optimizer), flat_state(expected)
    assert states.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(states[key].cpu(), wanted[key])] == []


# ---- compiled --------------------------------------------------------------------------------------------------


def trained(on_cuda: OnCuda, steps: int, compiled: Callable[..., Callable] | None) -> tuple[list[float], list[Tensor]]:
    """Losses and parameters of a small model, trained with 8-bit states."""
    model = make_model().to(on_cuda.device)
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-2)
    step = usual_step(model, optimizer)
    if compiled is not None:
        step = compiled(step, optimizer)
    with on_cuda.kernels():
        losses = [step(x.to(on_cuda.device), y.to(on_cuda.device)).item() for x, y in batches(steps)]
    return losses, [p.detach().cpu() for p in model.parameters()]


def test_compiled_train_steps_are_the_eager_ones(on_cuda: OnCuda):
    """As one graph, forward, backward and optimizer; where this torch can."""

    def compiled(step: Callable, optimizer: torch.optim.Optimizer) -> Callable:
        try:
            return bnb.compiled_train_step(step, optimizer, backend="aot_eager")
        except NotImplementedError as error:
            pytest.skip(str(error))

    (losses, found), (expected_losses, expected) = trained(on_cuda, 4, compiled), trained(on_cuda, 4, None)
    assert_close(losses, expected_losses, rtol=1e-4, atol=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_quantized_layers_compile_as_one_graph(on_cuda: OnCuda):
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.LinearNF4(64, 128), nn.GELU(), Linear8bitLt(128, 32, has_fp16_weights=False))
    x = normal(5, 64, seed=1, dtype=torch.float32).to(on_cuda.device)
    with on_cuda.kernels():
        model = model.to(on_cuda.device)
        expected = model(x)
        torch.compiler.reset()
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)

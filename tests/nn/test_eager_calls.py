"""A forward that records no gradient: the work that it does beside the product, and that it holds nothing back."""

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.autograd.forward_ad import dual_level, make_dual
from torch.autograd.profiler import profile

import bnbops
import bnbops.functional as F
from cases.layers_4bit import inputs, linear

pytestmark = pytest.mark.every_torch


def int8(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return bnbops.nn.Linear8bitLt(128, 96, has_fp16_weights=False).to("cpu").eval()


KINDS: dict[str, Callable[..., nn.Module]] = {
    "nf4": lambda seed=0: linear(seed=seed, compress_statistics=False),
    "nested": lambda seed=0: linear(seed=seed),
    "int8": int8,
}
kinds = pytest.mark.parametrize("kind", KINDS)


def operators(call: Callable[[], object]) -> list[str]:
    with profile() as events:
        call()
    return sorted(event.name for event in events.function_events if "::" in event.name)


def frames(call: Callable[[], object], file: str) -> int:
    """How many functions of a file are called, also by torch."""
    count = 0

    def counting(frame, event, _argument):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.endswith(file)

    before = sys.getprofile()
    sys.setprofile(counting)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


@kinds
@pytest.mark.parametrize("frozen", [False, True], ids=["no grad", "frozen"])
@pytest.mark.parametrize("shape", [(2,), (1, 2)], ids=str)
def test_a_forward_is_its_operator_alone(kind, shape, frozen):
    """Neither views, nor the kernel for autograd, which is in Python, if nothing requires a gradient; results are the
    same bits as with it."""
    layer, x = KINDS[kind](), inputs(2).view(*shape, -1)
    expected = layer(x)
    layer.bias.requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):
        assert layer(x).equal(expected)
        product = "bnbops::linear_int8" if kind == "int8" else "bnbops::linear_4bit"
        allowed = {product, "aten::new_empty", "aten::empty", "aten::empty_strided"}
        found = operators(lambda: layer(x))
        assert found.count(product) == 1 and set(found) <= allowed
        assert frames(lambda: layer(x), "meta_kernels/autograd.py") == 0
    layer.bias.requires_grad_()
    assert frames(lambda: layer(x), "meta_kernels/autograd.py") > 0  # what is counted exists


@pytest.mark.filterwarnings("ignore:matmul_4bit")
@torch.no_grad()
def test_functions_pass_autograd_by_too():
    x = inputs(2)
    codes, state = F.quantize_4bit(torch.randn(96, 128), quant_type="nf4")
    transposed = F.quantize_4bit(torch.randn(128, 96), quant_type="nf4")
    for call in (
        lambda: bnbops.matmul_4bit(x, codes, state),
        lambda: bnbops.matmul_4bit(x, *transposed),
        lambda: F.gemv_4bit(x, codes, state=state),
    ):
        assert call().shape == (2, 96) and frames(call, "meta_kernels/autograd.py") == 0


@kinds
def test_gradients_and_refusals_are_those_of_the_operator(kind):
    layer, x = KINDS[kind](), inputs(2)
    y = layer(x.clone().requires_grad_())
    assert y.requires_grad and layer(x).grad_fn is not None  # that of the bias
    with torch.no_grad():
        assert not layer(x.clone().requires_grad_()).requires_grad
        with dual_level(), pytest.raises(RuntimeError, match="jvp are not supported"):
            layer(make_dual(x, x))
        with pytest.raises(RuntimeError, match="jvp are not supported"):
            torch.func.jvp(layer, (x,), (x,))
        with pytest.raises(RuntimeError, match="vmap is not supported"):
            torch.vmap(layer)(x)


def weight_in_place(layer: nn.Module, other: nn.Module) -> None:
    for name, tensor in other.tensors().items():
        getattr(layer, name).data.copy_(tensor)


def weight_assigned(layer: nn.Module, other: nn.Module) -> None:
    layer.weight = copy.deepcopy(other.weight)


def registered_anew(layer: nn.Module, other: nn.Module) -> None:
    for name, tensor in other.tensors().items():
        (layer._parameters if name in layer._parameters else layer._buffers)[name] = tensor


def through_meta(layer: nn.Module, other: nn.Module) -> None:
    layer.to("meta")
    assert layer(torch.empty(1, 128, device="meta")).is_meta
    layer.load_state_dict(other.state_dict(), assign=True)


def as_attributes(layer: nn.Module, other: nn.Module) -> None:
    """As pruning and the first FSDP hold them."""
    for name, tensor in other.tensors().items():
        layer._parameters.pop(name, None), layer._buffers.pop(name, None)
        vars(layer)[name] = tensor


def by_properties(layer: nn.Module, other: nn.Module) -> None:
    """As SimpleFSDP gathers them: torch still has the shards by their names."""
    tensors = other.tensors()
    layer.__class__ = type("Gathering", (type(layer),), {n: property(lambda _, n=n: tensors[n]) for n in tensors})


CHANGES = {
    "in place": weight_in_place,
    "assigned": weight_assigned,
    "loaded": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "loaded, assigned": lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
    "registered": registered_anew,
    "meta": through_meta,
    "attributes": as_attributes,
    "properties": by_properties,
}


@kinds
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_forward_sees_what_has_changed(kind, change):
    layer, other, x = KINDS[kind](), KINDS[kind](seed=1), inputs(2)
    other.bias.copy_(layer.bias)
    before, expected = layer(x), other(x)
    assert not before.equal(expected)
    CHANGES[change](layer, other)
    assert layer(x).equal(expected)


@kinds
@torch.no_grad()
def test_copies_have_weights_of_their_own(kind):
    layer, other, x = KINDS[kind](), KINDS[kind](seed=1), inputs(2)
    before = layer(x)
    copied = copy.deepcopy(layer)
    weight_in_place(layer, other)
    assert copied(x).equal(before) and not layer(x).equal(before)
    assert copied.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@kinds
@torch.no_grad()
def test_functional_call_has_the_tensors_that_it_is_given(kind):
    layer, other, x = KINDS[kind](), KINDS[kind](seed=1), inputs(2)
    before = layer(x)
    tensors = dict(other.named_parameters()) | dict(other.named_buffers())
    assert torch.func.functional_call(layer, tensors, (x,)).equal(other(x))
    assert layer(x).equal(before)

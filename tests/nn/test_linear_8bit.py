"""bnbops.nn.Linear8bitLt and Int8Params: what they compute, how a weight is quantized, copied and moved.

Reference: the product of `bnbops.matmul`, which test_matmul_int8 holds.
"""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

from bnbops import MatmulLtState, matmul
from bnbops.functional import int8_vectorwise_dequant
from bnbops.nn import Int8Params, Linear8bitLt
from cases.linear_8bit import assert_quantized, inputs, layer

pytestmark = pytest.mark.every_torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ---- construction and quantization -----------------------------------------------------------------------------


def test_construction():
    module = Linear8bitLt(40, 24, False, True, 6.0, None, "meta")
    assert isinstance(module, nn.Linear) and (module.in_features, module.out_features) == (40, 24)
    assert module.bias is None and module.weight.is_meta and module.weight.requires_grad and module.index is None
    assert "has_fp16_weights=True, threshold=6.0" in repr(module)
    torch.manual_seed(0)
    linear = nn.Linear(40, 24)
    torch.manual_seed(0)
    frozen = Linear8bitLt(40, 24, has_fp16_weights=False)
    assert torch.equal(frozen.weight, linear.weight) and torch.equal(frozen.bias, linear.bias)
    assert type(frozen.weight) is Int8Params and not frozen.weight.requires_grad and frozen.bias.requires_grad
    assert (frozen.weight.CB, frozen.weight.SCB, frozen.weight_scale, frozen.SCB) == (None,) * 4


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "move",
    [
        lambda module: module.to("cpu"),
        lambda module: module.cpu(),
        lambda module: module.to(torch.zeros(1)),
        lambda module: module.to("cpu", torch.bfloat16),
        lambda module: nn.Sequential(module).to(device="cpu")[0],
    ],
)
def test_moving_quantizes(move, dtype):
    module = Linear8bitLt(40, 24, has_fp16_weights=False).to(dtype)
    weight, data = module.weight, module.weight.detach().clone()
    assert weight.dtype == dtype and move(module) is module
    assert_quantized(module)
    assert module.weight is weight  # in place: whoever holds it sees the codes
    scales = data.half().abs().amax(1).float()
    assert torch.equal(module.SCB, scales)
    error = (int8_vectorwise_dequant(weight.data, module.SCB) - data).abs().amax(1)
    assert (error <= scales * (0.5 / 127 + 1e-3)).all()


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")])
def test_casts_and_meta_do_not_quantize(cast):
    module = cast(Linear8bitLt(40, 24, has_fp16_weights=False))
    assert type(module.weight) is Int8Params and module.weight.is_floating_point() and module.SCB is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
def test_weights_that_float16_cannot_hold_are_refused(bad):
    module = Linear8bitLt(40, 24, has_fp16_weights=False)
    module.weight.data[3, 4] = bad
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match="float16 cannot hold"):
        module.to("cpu")
    assert torch.equal(module.weight.view(torch.int32), before.view(torch.int32))
    assert module.weight.dtype == torch.float32 and module.SCB is None


def test_zero_rows_and_columns():
    module = Linear8bitLt(40, 24, has_fp16_weights=False)
    module.weight.data[3] = 0
    module.to("cpu")
    assert torch.equal(module(inputs(5))[:, 3], module.bias[3].expand(5))


# ---- forward and backward --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_fp16_weights", [False, True])
def test_forward(has_fp16_weights, dtype):
    """The product of the weight as it was, in training and evaluation; nothing is written."""
    module = layer(has_fp16_weights)
    weight = module.weight if has_fp16_weights else module.weight.CB
    before = {name: (p, p.data_ptr(), p._version, p.detach().clone()) for name, p in module.named_parameters()}
    results = []
    for mode in (True, False):
        state = MatmulLtState(SCB=module.SCB, threshold=3.0, is_training=mode)
        expected = matmul(inputs(2, 3, dtype=dtype), weight, state=state, bias=module.bias)
        results.append(module.train(mode)(inputs(2, 3, dtype=dtype)))
        assert torch.equal(results[-1], expected) and expected.dtype == dtype
    assert not torch.equal(*results)
    for name, p in module.named_parameters():
        same, pointer, version, value = before[name]
        assert p is same and (p.data_ptr(), p._version) == (pointer, version) and torch.equal(p, value)


def test_both_kinds_of_weight_agree():
    assert torch.equal(layer(True)(inputs(5)), layer(False)(inputs(5)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("has_fp16_weights", [False, True])
def test_activation_checkpointing(has_fp16_weights, reentrant):
    model = nn.Sequential(layer(has_fp16_weights), nn.GELU(), nn.Linear(24, 8))

    def gradients(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = inputs(5).requires_grad_()
        model.zero_grad()
        forward(x).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    expected = gradients(model)
    assert len(expected) == (5 if has_fp16_weights else 4)
    assert all(map(torch.equal, gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant)), expected))


@pytest.mark.parametrize("has_fp16_weights", [False, True])
def test_autocast(has_fp16_weights):
    module = layer(has_fp16_weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = module(inputs(5))
    assert result.dtype == torch.bfloat16 and torch.equal(result, module(inputs(5).bfloat16()))
    result.float().sum().backward()
    assert module.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("has_fp16_weights", [False, True])
def test_functional_call(has_fp16_weights):
    """With plain tensors, all of them or some."""
    module = layer(has_fp16_weights)
    tensors = {name: p.detach().as_subclass(Tensor).clone() for name, p in module.named_parameters()}
    assert list(tensors) == ["weight", "bias", *([] if has_fp16_weights else ["weight_scale"])]
    assert torch.equal(functional_call(module, tensors, inputs(5)), module(inputs(5)))
    if not has_fp16_weights:
        doubled = {"weight_scale": (2 * module.SCB).view(torch.int32), "bias": 2 * module.bias}
        assert torch.equal(functional_call(module, doubled, inputs(5)), 2 * module(inputs(5)))
    module(inputs(5)).square().sum().backward()
    trained = {name: x for name, x in tensors.items() if x.is_floating_point()}
    for x in trained.values():
        x.requires_grad_()
    functional_call(module, tensors, inputs(5)).square().sum().backward()
    assert all(torch.equal(x.grad, module.get_parameter(name).grad) for name, x in trained.items())


def test_functional_gradient_of_a_float_weight():
    module = layer(True)
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    gradients = grad(lambda p: functional_call(module, p, inputs(5)).square().sum())(tensors)
    module(inputs(5)).square().sum().backward()
    assert all(torch.equal(value, module.get_parameter(name).grad) for name, value in gradients.items())


def test_trains():
    """A float weight through its int8 rounding: the loss of a linear map falls as for nn.Linear."""
    losses = []
    for cls in (nn.Linear, Linear8bitLt):
        torch.manual_seed(0)
        module, target = cls(40, 24), nn.Linear(40, 24)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(100):
            x = torch.randn(64, 40)
            loss = (module(x) - target(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.02 and losses[1] < losses[0] + 0.01


def test_bad_input():
    module, fresh = layer(), Linear8bitLt(40, 24, has_fp16_weights=False)
    unscaled = layer()
    unscaled.weight = Int8Params(module.weight.data, False)
    cases = [
        ("last dimensions must be equal", lambda: module(inputs(5)[:, :39])),
        ("got float64", lambda: module(inputs(5).double())),
        ("got int64", lambda: module(inputs(5).long())),
        (r"is not quantized: load it, then move the module with \.to\(device\)", lambda: fresh(inputs(5))),
        ("has no scales", lambda: unscaled(inputs(5))),
    ]
    for message, call in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(ValueError, match="24 rows, but its SCB has 23"):
        module.weight = Int8Params(module.weight.data, False, SCB=torch.ones(23))
    assert_quantized(module)
    assert module(inputs(0)).shape == (0, 24) and module(inputs()).shape == (24,)


# ---- casts and copies ------------------------------------------------------------------------------------------


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def under(flag: str, module: nn.Module) -> nn.Module:
    """Casts where torch puts new parameters into the module ("overwrite") or exchanges their contents ("swap")."""
    set_flag = getattr(torch.__future__, f"set_{flag}_module_params_on_conversion")
    set_flag(True)
    try:
        return module.to(torch.bfloat16).to("cpu").float()
    finally:
        set_flag(False)


WAYS = {
    "as it is": lambda module: module,
    "deepcopy": copy.deepcopy,
    "deepcopy in a model": lambda module: copy.deepcopy(nn.Sequential(nn.ReLU(), module))[1],
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
    "casts": lambda module: module.half().to(torch.bfloat16).double().float(),
    "cast and move": lambda module: module.to("cpu", torch.float16).cpu().float(),
    "new parameters": lambda module: under("overwrite", module),
    "exchanged contents": lambda module: under("swap", module),
    "share_memory": lambda module: module.share_memory(),
}


@pytest.mark.parametrize("way", WAYS)
def test_copies_and_casts_of_a_quantized_layer(way):
    module = layer()
    module.bias.data.fill_(0.5)  # casts do not change it
    codes, scales, expected = module.weight.CB.clone(), module.SCB.clone(), module(inputs(5)).detach()
    other = WAYS[way](module)
    assert_quantized(other)
    assert torch.equal(other.weight, codes) and torch.equal(other.SCB, scales)
    assert torch.equal(other(inputs(5)), expected)
    if "deepcopy" in way or way in ("pickle", "torch.save"):
        other.weight_scale.data.zero_()
        assert torch.equal(module.SCB, scales) and not other.weight.SCB.any()


@pytest.mark.parametrize("way", WAYS)
def test_copies_and_casts_of_a_float_weight(way):
    """A layer's own trainable weight is a plain parameter; an assigned Int8Params stays one and stays a float."""
    for assigned in (False, True):
        module = layer(True)
        if assigned:
            module.weight = Int8Params(module.weight.data, has_fp16_weights=True)
        module(inputs(5)).sum().backward()
        module = WAYS[way](module)
        assert type(module.weight) is (Int8Params if assigned else nn.Parameter) and module.weight.requires_grad
        assert module.weight.is_floating_point() and module.SCB is None
        assert module(inputs(5)).shape == (5, 24)
        if "cast" in way or "parameters" in way:
            assert module.half().weight.grad.dtype == torch.float16


def test_through_meta():
    module = layer()
    expected, state = module(inputs(5)), copy.deepcopy(module.state_dict())
    module = module.to("meta")
    assert module.weight.is_meta and module.SCB.is_meta and type(module.weight) is Int8Params
    module = module.to_empty(device="cpu")
    assert_quantized(module)
    module.load_state_dict(state)
    assert torch.equal(module(inputs(5)), expected)

    fresh = Linear8bitLt(40, 24, has_fp16_weights=False, threshold=3.0, device="meta").to_empty(device="cpu")
    assert type(fresh.weight) is Int8Params and fresh.weight.is_floating_point()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(inputs(5)), expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_forward_without_data(frozen):
    """On the meta device, which has no autocast: shapes and dtypes come out."""
    module = Linear8bitLt(40, 24, has_fp16_weights=not frozen).to("cpu").to("meta")
    out = module(torch.empty(5, 40, dtype=torch.bfloat16, device="meta"))
    assert out.is_meta and out.shape == (5, 24) and out.dtype == torch.bfloat16


def test_parameters_alone():
    """Int8Params outside of a module."""
    data = torch.randn(24, 40)
    weight = Int8Params(data.clone(), requires_grad=False)
    assert weight.to("cpu") is weight and weight.to("cpu") is weight and weight.dtype == torch.int8
    assert weight.to(torch.float16) is weight and weight.CB.data_ptr() == weight.data_ptr()
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), Int8Params(weight.data, **vars(weight))):
        assert type(other) is Int8Params and other is not weight and not other.requires_grad
        assert torch.equal(other, weight) and torch.equal(other.SCB, weight.SCB)
    assert torch.equal(Int8Params(weight).SCB, weight.SCB)
    a, b = copy.deepcopy([weight, weight])
    assert a is b
    assert not Int8Params(data.clone()).to("cpu").requires_grad  # bitsandbytes' default is True
    moved = weight.to("meta")
    assert type(moved) is Int8Params and moved.is_meta and moved.SCB.is_meta
    assert Int8Params().numel() == 0
    trained = Int8Params(data.clone(), has_fp16_weights=True)
    assert trained.to("cpu") is trained and trained.is_floating_point() and trained.requires_grad
    trained.to(torch.float16).sum().backward()  # a cast that is part of a graph
    assert torch.equal(trained.grad, torch.ones(24, 40))

"""bnbops.nn.quantize_: what it converts, what it leaves, shared weights and experts."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

import bnbops
from bnbops.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt
from bnbops.nn import quantization_plan as plan_of
from cases.quantize_model import (
    FORMATS,
    LINEARS,
    TOKENS,
    Net,
    assert_unchanged,
    by_hand,
    experts,
    named,
    net,
    on_meta,
    quantize_,
    snapshot,
)

pytestmark = pytest.mark.every_torch

# ---- conversion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", FORMATS)
def test_layers_are_those_made_by_hand(quant: str) -> None:
    model, expected = net(), net()
    for layer in expected.layers:
        layer[0], layer[2] = by_hand(layer[0], quant), by_hand(layer[2], quant)
    assert quantize_(model, quant) is model

    assert [name for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)] == LINEARS
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(model(TOKENS), expected(TOKENS))
    assert not any(module.weight.requires_grad for name in LINEARS for module in [model.get_submodule(name)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = net(dtype=dtype)
    expected = model(TOKENS)
    out = quantize_(model, "nf4")(TOKENS)
    assert out.dtype == dtype
    assert model.layers[0][0].weight.quant_state.dtype == dtype
    assert (out - expected).float().norm() < 0.1 * expected.float().norm()


def test_options_arrive() -> None:
    model = quantize_(
        net(), "fp4", double_quant=False, blocksize=32, compute_dtype=torch.bfloat16, quant_storage=torch.float16
    )
    layer = model.layers[0][0]
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("fp4", False, 32)
    assert (layer.compute_dtype, layer.weight.dtype) == (torch.bfloat16, torch.float16)
    assert quantize_(net(), "int8", threshold=3.0).layers[0][0].threshold == 3.0
    assert not quantize_(net(), "int8").layers[0][0].has_fp16_weights


@pytest.mark.parametrize(("quant", "kind"), [("nf4", Embedding4bit), ("fp4", Embedding4bit), ("int8", Embedding8bit)])
def test_embeddings(quant: str, kind: type) -> None:
    model = net()
    rows = model.embed(TOKENS)
    quantize_(model, quant, embeddings=True)
    assert type(model.embed) is kind
    assert 0 < (model.embed(TOKENS) - rows).norm() < 0.15 * rows.norm()


def test_a_padding_row_stays_zero() -> None:
    model = nn.Sequential(nn.Embedding(20, 64, padding_idx=3))
    quantize_(model, "nf4", embeddings=True)
    assert model[0].padding_idx == 3
    assert not model(torch.tensor([3])).any()


def test_what_a_layer_has_beside_its_weight_stays() -> None:
    model, calls = net().eval(), []
    layer = model.layers[0][0]
    layer.note = "mine"
    layer.bias.requires_grad_(False)
    layer.train()
    before = layer.register_forward_pre_hook(lambda module, args: calls.append(("before", type(module))))
    layer.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(("after", sorted(kwargs))), with_kwargs=True
    )
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append(("backward", None)))
    bias = layer.bias

    new = quantize_(model).layers[0][0]
    assert new.note == "mine"
    assert new.bias is bias
    assert new.training
    assert not model.layers[0][2].training
    model(TOKENS).sum().backward()
    assert calls == [("before", Linear4bit), ("after", []), ("backward", None)]
    before.remove()
    model(TOKENS)
    assert len(calls) == 4  # one "after" more


def test_quantizing_again_changes_nothing() -> None:
    model = quantize_(net(), "nf4")
    before = snapshot(model)
    quantize_(model, "nf4")
    assert_unchanged(model, before)
    assert plan_of(model).leave["layers.0.0"] == "it is quantized already"
    assert plan_of(model).unasked == ()


def test_formats_mix() -> None:
    model = quantize_(quantize_(net(), "int8", skip=["layers.0", "lm_head"]), "nf4")
    assert [type(module) for layer in model.layers for module in (layer[0], layer[2])] == [
        *(Linear4bit, Linear4bit, Linear8bitLt, Linear8bitLt)
    ]


def test_state_dict_loads_into_another_quantized_model(tmp_path: Path) -> None:
    source = quantize_(net(), "nf4", embeddings=True)
    save_file({name: tensor.contiguous() for name, tensor in source.state_dict().items()}, tmp_path / "q.safetensors")
    state = load_file(tmp_path / "q.safetensors")
    for target in (quantize_(net(1), "nf4", embeddings=True), quantize_(on_meta(Net), "nf4", embeddings=True)):
        target.load_state_dict(state, strict=True, assign=True)
        assert torch.equal(target(TOKENS), source(TOKENS))


@pytest.mark.parametrize("quant", FORMATS)
def test_copies_compute_the_same(quant: str) -> None:
    model = quantize_(net(), quant)
    assert torch.equal(copy.deepcopy(model)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoders_of_torch(quant: str, norm_first: bool) -> None:
    """In evaluation they hand weights to a fused kernel, which would take codes for floats."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x, mask = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=mask)[~mask]
        with pytest.warns(
            UserWarning, match=r"layers\.0\.self_attn\.out_proj: it is a NonDynamicallyQuantizableLinear"
        ):
            quantize_(model, quant)
        found = model(x, src_key_padding_mask=mask)[~mask]
    assert (found - expected).norm() < 0.2 * expected.norm()


# ---- what is left --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (None, ["lm_head"]),
        ((), []),
        ("layers.1", ["layers.1.0", "layers.1.2"]),
        (["layers.1.2", "lm_head"], ["layers.1.2", "lm_head"]),
        (["layers.*.2"], ["layers.0.2", "layers.1.2"]),
        (["0.2"], ["layers.0.2"]),
        (["*head"], ["lm_head"]),
        (["l*"], [*LINEARS, "lm_head"]),
        (["norm"], []),
        (lambda name, module: module.out_features == 64, ["layers.0.2", "layers.1.2"]),
    ],
    ids=named,
)
def test_skip(skip, left: list[str]) -> None:
    plan = plan_of(net(), skip=skip)
    assert list(plan.leave) == left
    assert list(plan.convert) == [name for name in [*LINEARS, "lm_head"] if name not in left]
    assert plan.unasked == ()
    model = quantize_(net(), skip=skip)
    assert [name for name, module in model.named_modules() if type(module) is nn.Linear] == left


@pytest.mark.parametrize(
    ("skip", "error", "message"),
    [
        (["lm_haed"], ValueError, "skip: nothing in the model is called 'lm_haed'"),
        (["head"], ValueError, "skip: nothing in the model is called 'head'"),
        (["0.0.0"], ValueError, "skip: nothing in the model is called '0.0.0'"),
        ([3], TypeError, "skip holds names and patterns, or is a function; got 3 in it"),
    ],
)
def test_bad_skip(skip, error: type[Exception], message: str) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        quantize_(model, skip=skip)
    assert_unchanged(model, before)


def test_the_output_embeddings_that_a_model_names_are_left() -> None:
    class Named(Net):
        def get_output_embeddings(self) -> nn.Module:
            return self.layers[1][2]

    torch.manual_seed(0)
    assert plan_of(nn.Sequential(Named())).leave == {
        "0.layers.1.2": "it is the output head",
        "0.lm_head": "it is the output head",
    }


class Sub(nn.Linear):
    pass


def _computed(linear: nn.Linear) -> nn.Linear:
    return prune.random_unstructured(linear, "weight", 0.5)


def _replaced(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x: x
    return linear


def _hooked(linear: nn.Linear) -> nn.Linear:
    linear.weight.register_hook(lambda grad: grad)
    return linear


def _saved_otherwise(linear: nn.Linear) -> nn.Linear:
    linear.register_state_dict_post_hook(lambda *args: None)
    return linear


def _buffered(linear: nn.Linear) -> nn.Linear:
    linear.register_buffer("extra", torch.zeros(2))
    return linear


@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (lambda: Sub(64, 64), "it is a Sub, not a plain Linear"),
        (lambda: nn.LazyLinear(64), "it is a LazyLinear, not a plain Linear"),
        (lambda: parametrizations.weight_norm(nn.Linear(64, 64)), "it is parametrized"),
        (lambda: _computed(nn.Linear(64, 64)), "it holds more than a weight and a bias, or computes its weight"),
        (lambda: _buffered(nn.Linear(64, 64)), "it holds more than a weight and a bias, or computes its weight"),
        (lambda: _replaced(nn.Linear(64, 64)), "its forward has been replaced"),
        (lambda: _saved_otherwise(nn.Linear(64, 64)), "it has hooks on its state dict"),
        (lambda: _hooked(nn.Linear(64, 64)), "its weight has gradient hooks"),
        (lambda: nn.Linear(64, 64, dtype=torch.float64), "its weight is float64"),
        (lambda: nn.Linear(64, 0), "its weight has no elements"),
    ],
)
def test_linears_that_are_left(linear: Callable[[], nn.Linear], reason: str) -> None:
    model = nn.ModuleDict({"odd": linear(), "plain": nn.Linear(64, 64)})
    odd = model["odd"]
    with pytest.warns(UserWarning, match=f"leaves these as they are:\n  odd: {reason}"):
        quantize_(model)
    assert model["odd"] is odd
    assert type(model["plain"]) is Linear4bit
    assert plan_of(model).unasked == ("odd",)


def test_an_embedding_that_changes_its_rows_is_left() -> None:
    model = nn.Sequential(nn.Embedding(20, 64, max_norm=1.0), bnbops.nn.StableEmbedding(20, 64))
    assert plan_of(model, embeddings=True).leave == {
        "0": "its max_norm changes rows that are looked up",
        "1": "it is a StableEmbedding, not a plain Embedding",
    }


def test_a_plan_reads_as_a_table() -> None:
    assert str(plan_of(net(), "int8", embeddings=True)).splitlines() == [
        "embed       becomes Embedding8bit",
        *(f"{name}  becomes Linear8bitLt" for name in LINEARS),
        "lm_head     is left: it is the output head",
    ]


# ---- shared weights ------------------------------------------------------------------------------------------------


def test_a_head_tied_to_the_embedding_stays_tied() -> None:
    model = net(tied=True)
    with pytest.warns(UserWarning, match="embed: shares its weight with lm_head"):
        quantize_(model, embeddings=True)
    assert model.lm_head.weight is model.embed.weight
    assert model.embed.weight.dtype == torch.float32
    with pytest.warns(UserWarning, match="lm_head: shares its weight with embed"):
        quantize_(model, skip=())


@pytest.mark.parametrize("quant", FORMATS)
def test_a_head_and_its_embedding_share_a_quantized_weight_if_both_are_asked_for(quant: str) -> None:
    model, apart = net(tied=True), net()
    apart.load_state_dict(model.state_dict())
    quantize_(model, quant, embeddings=True, skip=())
    quantize_(apart, quant, embeddings=True, skip=())
    assert model.lm_head.weight is model.embed.weight
    scales = "weight_scale" if quant == "int8" else "weight_absmax"
    assert getattr(model.lm_head, scales) is getattr(model.embed, scales)
    assert torch.equal(model(TOKENS), apart(TOKENS))
    assert torch.equal(copy.deepcopy(model).to(torch.bfloat16).to(torch.float32).embed(TOKENS), apart.embed(TOKENS))

    again = quantize_(on_meta(lambda: Net(tied=True)), quant, embeddings=True, skip=())
    again.load_state_dict(apart.state_dict(), assign=True)
    assert torch.equal(again(TOKENS), apart(TOKENS))


@pytest.mark.parametrize("share", ["parameter", "memory"])
@pytest.mark.parametrize("quant", FORMATS)
def test_linears_that_share_a_weight_share_the_quantized_one(quant: str, share: str) -> None:
    model = net()
    first, second = model.layers[0][0], model.layers[1][0]
    second.weight = first.weight if share == "parameter" else nn.Parameter(first.weight.data)
    expected = copy.deepcopy(model)
    for layer in expected.layers:
        layer[0], layer[2] = by_hand(layer[0], quant), by_hand(layer[2], quant)
    quantize_(model, quant)

    first, second = model.layers[0][0], model.layers[1][0]
    assert first.weight is second.weight
    assert first.bias is not second.bias
    scales = "weight_scale" if quant == "int8" else "weight_absmax"
    assert getattr(first, scales).data_ptr() == getattr(second, scales).data_ptr()
    assert torch.equal(model(TOKENS), expected(TOKENS))
    assert len(list(model.parameters())) == len(set(map(id, model.parameters())))


def test_sharers_are_left_together() -> None:
    model = net()
    model.layers[1][0].weight = model.layers[0][0].weight
    assert plan_of(model, skip=["layers.1"]).leave == {
        "layers.0.0": "shares its weight with layers.1.0",
        "layers.1.0": "skip has 'layers.1'",
        "layers.1.2": "skip has 'layers.1'",
    }


def test_a_weight_that_something_else_holds_is_left() -> None:
    model = net()
    model.register_parameter("copy", model.layers[0][0].weight)
    model.register_parameter("turned", nn.Parameter(model.layers[0][2].weight.data.T))
    plan = plan_of(model, skip=())
    assert plan.leave == {"layers.0.0": "shares its weight with copy", "layers.0.2": "shares its weight with turned"}


def test_a_module_in_two_places_is_one_module_afterwards() -> None:
    model = net()
    model.layers[1] = model.layers[0]
    model.again = model.layers[0][2]
    quantize_(model)
    assert model.layers[1] is model.layers[0]
    assert model.again is model.layers[0][2]
    assert type(model.again) is Linear4bit


# ---- experts -------------------------------------------------------------------------------------------------------


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def test_expert_parameters() -> None:
    model = experts()
    expected = model(X)
    assert plan_of(model).convert == {
        "0": "Linear4bit",
        "1.up": "a 4-bit parametrization",
        "1.down": "a 4-bit parametrization",
        "1.position": "Linear4bit",
    }
    quantize_(model)
    assert model.state_dict()["1.up"].dtype == model.state_dict()["1.down"].dtype == torch.uint8
    assert (model(X) - expected).norm() < 0.2 * expected.norm()
    assert quantize_(experts(), experts=False)[1].up.dtype == torch.float32
    assert quantize_(experts(), skip="up")[1].up.requires_grad


def test_expert_parameters_have_no_int8_form() -> None:
    model = experts()
    with pytest.warns(UserWarning, match=r"1\.up: there is no int8 form of 3-D parameters"):
        quantize_(model, "int8")
    assert model[1].up.dtype == torch.float32
    assert type(model[1].position) is Linear8bitLt


def test_other_parameters_of_three_dimensions_are_no_experts() -> None:
    model = nn.ModuleDict({"experts": nn.Conv1d(64, 64, 3), "positions": nn.Sequential()})
    model["positions"].register_parameter("table", nn.Parameter(torch.randn(1, 8, 64)))
    plan = plan_of(model)
    assert (plan.convert, plan.leave) == ({}, {})


def test_expert_parameters_from_a_state() -> None:
    source = experts()
    model = quantize_(on_meta(experts), state=source.state_dict())
    assert torch.equal(model(X), quantize_(source)(X))
    again = quantize_(on_meta(experts))
    again.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(again(X), model(X))


# ---- bad input -----------------------------------------------------------------------------------------------------


def _nan(model: Net) -> Net:
    model.layers[1][2].weight.data[3, 3] = torch.nan
    return model


def _large(model: Net) -> Net:
    model.layers[1][2].weight.data[3, 3] = 1e5
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (net, {"quant": "nf5"}, "quant must be one of nf4, fp4, int4, int8, got 'nf5'"),
        (net, {"blocksize": 48}, "blocksize"),
        (net, {"quant_storage": torch.int64}, "quant_storage"),
        (net, {"compute_dtype": torch.int8}, "compute_dtype"),
        (net, {"threshold": 3.0}, "threshold is an option of int8, not of nf4"),
        (net, {"quant": "int8", "blocksize": 32, "double_quant": False}, "double_quant, blocksize: not for int8"),
        (net, {"quant": "int8", "threshold": -1.0}, "threshold must not be negative or NaN, got -1.0"),
        (net, {"quant": "int8", "threshold": float("nan")}, "threshold must not be negative or NaN, got nan"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), {"quant_storage": torch.float32}, r"0\.weight cannot be quantized: "),
        (lambda: _nan(net()), {}, r"layers\.1\.2\.weight has a value that is NaN, infinite or beyond 3\.40282e\+38"),
        (
            lambda: _nan(net()),
            {"quant": "int8"},
            r"layers\.1\.2\.weight has a value that is NaN, infinite or beyond 65504",
        ),
        (lambda: _large(net()), {"quant": "int8"}, "beyond 65504"),
        (lambda: nn.Linear(3, 3), {}, "the model is itself a Linear"),
    ],
    ids=named,
)
def test_bad_arguments(make: Callable[[], nn.Module], options: dict, message: str) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        quantize_(model, **options)
    assert_unchanged(model, before)


def test_a_model_is_a_module() -> None:
    with pytest.raises(TypeError, match="expected a module, got dict"):
        quantize_({})

"""State dicts of Linear8bitLt: bitsandbytes' keys, dtypes and bytes in both directions, and what is refused."""

import copy
import io

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from bnbops.nn import Int8Params, Linear8bitLt

KEYS = ["weight", "bias", "SCB", "weight_format"]
THRESHOLDS = {0: 0.0, 6: 6.0}
thresholds = pytest.mark.parametrize("threshold", THRESHOLDS)


def fresh(device: str | None = None, **options: object) -> Linear8bitLt:
    """96 -> 64 features, as in the golden files."""
    return Linear8bitLt(96, 64, **{"has_fp16_weights": False, "device": device, **options})


def golden_state(data: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "state_dict."
    return {name.removeprefix(prefix): tensor for name, tensor in data.items() if name.startswith(prefix)}


def quantized(seed: int = 0) -> Linear8bitLt:
    torch.manual_seed(seed)
    return fresh().to("cpu")


def inputs() -> Tensor:
    return torch.randn(5, 96, generator=torch.Generator().manual_seed(1))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Keys, dtypes, shapes and values."""
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# ---- bitsandbytes ----------------------------------------------------------------------------------------------


@thresholds
def test_quantizing_gives_bitsandbytes_bytes(golden, threshold):
    data = golden(f"linear8bitlt_64x96_t{threshold}.safetensors")
    module = fresh(threshold=THRESHOLDS[threshold])
    module.weight = Int8Params(data["in.weight"].clone(), requires_grad=False)
    module.bias = nn.Parameter(data["in.bias"].clone())
    state, expected = module.to("cpu").state_dict(), golden_state(data)
    assert list(state) == KEYS and same(state, {key: expected[key] for key in KEYS})
    assert state["weight_format"].shape == () and type(state["weight"]) is Tensor


@pytest.mark.every_torch
@pytest.mark.every_torch
@thresholds
@pytest.mark.parametrize(
    "into, assign",
    [("fresh", False), ("fresh", True), ("meta", True), ("quantized", False), ("quantized", True)],
)
def test_bitsandbytes_checkpoints_load(golden, into, assign, threshold):
    """Strict; what is saved again has the same bytes, in either direction."""
    data = golden(f"linear8bitlt_64x96_t{threshold}.safetensors")
    expected = golden_state(data)
    module = quantized() if into == "quantized" else fresh("meta" if into == "meta" else None)
    module.half().threshold = THRESHOLDS[threshold]
    assert not any(module.load_state_dict(expected, assign=assign))
    assert same(module.state_dict(), {key: expected[key] for key in KEYS})
    assert type(module.weight) is Int8Params and module.weight.SCB.data_ptr() == module.weight_scale.data_ptr()
    assert not module.weight.requires_grad and module.bias.requires_grad


@pytest.mark.every_torch
@pytest.mark.every_torch
@thresholds
def test_forward_and_gradient_are_bitsandbytes(golden, threshold):
    """In training mode, where x is not rounded; in evaluation the product differs by that."""
    data = golden(f"linear8bitlt_64x96_t{threshold}.safetensors")
    module = fresh(threshold=THRESHOLDS[threshold]).half()
    module.load_state_dict(golden_state(data))
    x = data["in.x"].clone().requires_grad_()
    out = module(x)
    torch.testing.assert_close(out, data["out.forward"], rtol=2**-10, atol=2e-3)
    out.backward(2 * data["out.forward"])
    row = x.detach().float()
    if threshold:
        row[:, (row.abs() >= threshold).any(0)] = 0
    step = row.abs().amax(1, keepdim=True) / 127
    weight = data["state_dict.weight"].float() * data["state_dict.SCB"].unsqueeze(1) / 127
    deviation = step / 12**0.5 * weight.norm(dim=1)  # of the products, as x is rounded to multiples of `step`
    error = (module.eval()(x) - data["out.forward"]).float().abs()
    assert (error <= 5 * deviation + 2e-3 * out.float().abs()).all() and (error > deviation).any()
    torch.testing.assert_close(x.grad, data["out.grad_x"], rtol=2e-3, atol=0.25)  # fp16 numbers up to 3600


# ---- formats and ways to load ----------------------------------------------------------------------------------


def through_torch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", [through_torch, lambda state: load(save(state)), copy.deepcopy, lambda state: state])
@pytest.mark.parametrize("assign", [False, True])
def test_round_trip_in_a_model(way, assign):
    model, other = nn.Sequential(nn.ReLU(), quantized()), nn.Sequential(nn.ReLU(), fresh())
    state = way(model.state_dict())
    assert set(state) == {f"1.{key}" for key in KEYS}
    assert not any(other.load_state_dict(state, assign=assign))
    assert torch.equal(other(inputs()), model(inputs()))
    assert (other[1].SCB.data_ptr() == state["1.SCB"].data_ptr()) == assign


def test_keep_vars():
    module = quantized()
    state = module.state_dict(keep_vars=True)
    assert state["weight"] is module.weight and state["bias"] is module.bias
    other = fresh()
    other.load_state_dict(state, assign=True)
    assert torch.equal(other(inputs()), module(inputs()))


@pytest.mark.parametrize("assign", [False, True])
def test_float_weights(assign):
    """They stay float in a fresh layer, and are quantized in a quantized one."""
    linear = nn.Linear(96, 64)
    expected = fresh()
    expected.load_state_dict(linear.state_dict(), assign=assign)
    assert type(expected.weight) is Int8Params and torch.equal(expected.weight, linear.weight)
    assert list(expected.state_dict()) == ["weight", "bias"]
    expected.to("cpu")
    module = quantized(seed=1)
    module.load_state_dict(linear.state_dict(), assign=assign)
    assert same(module.state_dict(), expected.state_dict())
    trained = fresh(has_fp16_weights=True)
    trained.load_state_dict(linear.state_dict(), assign=assign)
    assert same(trained.state_dict(), linear.state_dict()) and trained.weight.requires_grad


def test_older_checkpoints():
    """Without weight_format, with its name, or with scales of another float dtype or shape."""
    module = quantized()
    state = module.state_dict()
    for change in ({"weight_format": None}, {"weight_format": "row"}, {"SCB": state["SCB"].view(64, 1)}):
        changed = {key: value for key, value in (state | change).items() if value is not None}
        other = fresh()
        other.load_state_dict(changed)
        assert torch.equal(other(inputs()), module(inputs()))
    other.load_state_dict(state | {"SCB": state["SCB"].half()})
    assert torch.equal(other.SCB, state["SCB"].half().float())


@pytest.mark.parametrize("flag", ["overwrite", "swap"])
def test_while_torch_replaces_parameters(flag):
    set_flag = getattr(torch.__future__, f"set_{flag}_module_params_on_conversion")
    set_flag(True)
    try:
        for assign in (False, True):
            for module in (fresh(), quantized(1), fresh("meta").to_empty(device="cpu")):
                module.load_state_dict(quantized().state_dict(), assign=assign)
                assert type(module.weight) is Int8Params
                assert same(module.state_dict(), quantized().state_dict())
                assert module.weight.SCB.data_ptr() == module.weight_scale.data_ptr()
    finally:
        set_flag(False)


def test_partial_state_dicts():
    module = quantized()
    before = copy.deepcopy(module.state_dict())
    keys = module.load_state_dict({"bias": torch.ones(64)}, strict=False)
    assert keys.missing_keys == ["weight", "SCB"] and not keys.unexpected_keys
    assert same(module.state_dict(), before | {"bias": torch.ones(64)})
    assert fresh().load_state_dict({}, strict=False).missing_keys == ["weight", "bias"]


@pytest.mark.parametrize("target", [lambda: fresh("meta"), lambda: quantized(1).to("meta")], ids=["fresh", "quantized"])
def test_a_module_on_the_meta_device_gets_data(target):
    """As a 4-bit one does, without `assign`, for which torch alone would copy into nothing."""
    module, state = target(), quantized().state_dict()
    module.load_state_dict(state)
    assert same(module.state_dict(), state) and type(module.weight) is Int8Params
    assert all(module.state_dict()[key].data_ptr() != state[key].data_ptr() for key in KEYS)


# ---- bad state dicts -------------------------------------------------------------------------------------------


def bad_states() -> dict[str, tuple[dict[str, object], str]]:
    state = quantized().state_dict()
    codes, scales = state["weight"], state["SCB"]
    return {
        "tiles": ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "weight_format is 2; only weights by rows"),
        "tiles by name": ({"weight_format": "col_ampere"}, "weight_format is col_ampere"),
        "no scales": ({"SCB": None}, "must be int8 with its scales in SCB.* torch.int8 without SCB"),
        "no codes": ({"weight": None}, "SCB came without weight"),
        "floats with scales": ({"weight": codes.float()}, "torch.float32 with SCB"),
        "uint8": ({"weight": codes.view(torch.uint8)}, "torch.uint8 with SCB"),
        "few scales": ({"SCB": scales[:63]}, "SCB has 63 scales, but the weight has 64 rows"),
        "another shape": ({"weight": codes[:, :95]}, r"size mismatch for weight: \[64, 95\] in the state dict"),
        "floats with scales by their own name": (
            {"weight": codes.half(), "SCB": None, "weight_scale": scales.view(torch.int32)},
            "torch.float16 with SCB",
        ),
        "NaN": ({"weight": torch.full((64, 96), torch.nan), "SCB": None}, "float16 cannot hold"),
        "unknown key": ({"CB": codes}, 'Unexpected key.* "CB"'),
        "no bias": ({"bias": None}, 'Missing key.* "bias"'),
    }


@pytest.mark.parametrize("case", bad_states())
@pytest.mark.parametrize("assign", [False, True])
def test_bad_state_dicts(case, assign):
    """Refused with a message; the weight is as it was."""
    change, message = bad_states()[case]
    for module in (fresh(), quantized(1)):
        if case == "NaN" and module.SCB is None:
            continue  # a float weight may be anything, until it is quantized
        if "own name" in case and module.SCB is not None:
            continue  # which quantizes them
        before = copy.deepcopy(module.state_dict())
        state = {key: value for key, value in (quantized().state_dict() | change).items() if value is not None}
        given = dict(state)
        with pytest.raises(RuntimeError, match=message) as refusal:
            module.load_state_dict(state, assign=assign)
        if case == "floats with scales":
            words = (
                "Loading a quantized checkpoint into non-quantized Linear8bitLt"  # which users of bitsandbytes match
            )
            assert (words in str(refusal.value)) == (module.SCB is None)
        assert list(state) == list(given)
        if case not in ("unknown key", "no bias"):  # torch loads the rest and then raises
            assert same(module.state_dict(), before)


def test_codes_for_a_float_weight_are_refused():
    module = fresh(has_fp16_weights=True)
    message = "Loading a quantized checkpoint into non-quantized Linear8bitLt: .*has_fp16_weights must be False"
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(quantized().state_dict())
    assert module.weight.is_floating_point() and module.weight_scale is None


# ---- torch.distributed -----------------------------------------------------------------------------------------


def test_distributed_state_dicts_of_a_plain_model():
    model, other = nn.Sequential(quantized()), nn.Sequential(fresh())
    set_model_state_dict(other, get_model_state_dict(model))
    assert torch.equal(other(inputs()), model(inputs()))


def test_fsdp():
    """Codes and scales are sharded together; mixed precision casts neither; forward, backward, save and load."""
    model = nn.Sequential(quantized(), nn.Linear(64, 8))
    expected, state = model.bfloat16()(inputs().bfloat16()), copy.deepcopy(model.state_dict())
    model.float()
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh, policy = init_device_mesh("cpu", (1,)), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for module in (model[0], model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(model[0].weight, DTensor) and isinstance(model[0].weight_scale, DTensor)
        x = inputs().requires_grad_()
        assert torch.equal(model(x), expected)
        model(x).float().sum().backward()
        assert x.grad.abs().sum() > 0 and model[0].bias.grad is not None
        sharded = model.state_dict()
        assert list(sharded) == ["0.weight", "0.bias", "0.weight_scale", "1.weight", "1.bias"]
        assert torch.equal(sharded["0.weight"].full_tensor(), state["0.weight"])
        assert torch.equal(sharded["0.weight_scale"].full_tensor().view(torch.float32), state["0.SCB"])
        saved = {key: value.clone() for key, value in sharded.items()}
        model[0].weight_scale.to_local().zero_()
        assert not any(model.load_state_dict(saved))
        set_model_state_dict(model, get_model_state_dict(model))
        assert torch.equal(model(x), expected)
    finally:
        destroy_process_group()

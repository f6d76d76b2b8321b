"""Every class of bnbops.optim: its constructor, and which state a parameter gets."""

import ast
import copy
import inspect
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bnbops import optim
from bnbops.optim import Adam, Adam8bit, Adam32bit, AdamW, AdamW8bit, AdamW32bit
from cases.bitsandbytes_api import constructors
from cases.optimizer_classes import CLASSES, FAMILIES, WITH_8BIT, build, fixed_bits
from cases.optimizers import MIXED, assert_same, assert_same_state, flat_state, params, set_grads, train

CONSTRUCTORS = constructors("bitsandbytes.optim")
COMMON = ("is_paged", "percentile_clipping", "state_codec", "block_wise", "maximize", "paged_directory")

names = pytest.mark.parametrize("name", CLASSES)
families = pytest.mark.parametrize("name", FAMILIES)


# ---- constructor -----------------------------------------------------------------------------------------------


def test_every_class_of_bitsandbytes_is_here():
    assert set(CONSTRUCTORS) <= {*CLASSES, "GlobalOptimManager"}


@names
def test_further_arguments_are_keywords(name):
    """Behind those of bitsandbytes, where it has the class."""
    found = inspect.signature(getattr(optim, name)).parameters
    of_bitsandbytes = [parameter.name for parameter in CONSTRUCTORS.get(name, [])] or list(found)
    assert all(p.kind is p.KEYWORD_ONLY for key, p in found.items() if key not in of_bitsandbytes)
    assert set(COMMON) - ({"is_paged"} if name.startswith("Paged") else set()) <= found.keys()
    assert ("trust_clip" in found) == name.startswith(("LAMB", "LARS"))


@pytest.mark.parametrize("name", [name for name in CLASSES if name in CONSTRUCTORS])
def test_arguments_by_position(name):
    """Each one arrives where bitsandbytes has it."""
    cls = getattr(optim, name)
    values = {"lr": 0.5, "betas": (0.8, 0.95, 0.9)[: 3 if "Mix" in name else 2], "eps": 1e-6, "weight_decay": 0.3}
    values |= {"momentum": 0.7, "alpha": 0.75, "lr_decay": 0.25, "t_alpha": 7, "t_beta3": 9, "max_unorm": 0.125}
    values |= {"min_8bit_size": 100, "initial_accumulator_value": 0.5, "dampening": 0.1}
    described = CONSTRUCTORS[name][1:]
    arguments = [values[p.name] if p.name in values else ast.literal_eval(p.default) for p in described]
    group = cls(params((2, 2)), *arguments).param_groups[0]
    for parameter, value in zip(described, arguments, strict=True):
        if parameter.name in values:
            assert group[parameter.name] == value, parameter.name
    with pytest.raises(TypeError):
        cls(params((2, 2)), *arguments, 0)


@names
def test_a_class_is_an_ordinary_one(name):
    """It can be subclassed, pickled and looked up, and says what it is."""
    cls = getattr(optim, name)
    assert pickle.loads(pickle.dumps(cls)) is cls and inspect.getmodule(cls).__dict__[name] is cls
    assert cls.__name__ == cls.__qualname__ == name and cls.__doc__ and issubclass(cls, optim.Optimizer)
    assert type(build(name, params((2, 2)))).__name__ == name

    class Own(cls):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.5)

    assert list(inspect.signature(Own).parameters) == ["parameters"]
    assert Own(params((2, 2))).param_groups[0]["lr"] == 0.5
    with pytest.raises(TypeError, match=r"nonsense"):
        build(name, params((2, 2)), nonsense=1)


@names
def test_fixed_precisions_and_paging(name):
    """The name decides; an argument that bitsandbytes has all the same may not say otherwise."""
    assert build(name, params((2, 2))).param_groups[0]["optim_bits"] == (fixed_bits(name) or 32)
    assert build(name, params((2, 2))).param_groups[0]["is_paged"] == name.startswith("Paged")
    accepted = {parameter.name: parameter.default for parameter in CONSTRUCTORS.get(name, [])}
    if fixed_bits(name) and "optim_bits" in accepted:
        default = int(accepted["optim_bits"])
        for bits in (fixed_bits(name), default):
            group = build(name, params((2, 2)), optim_bits=bits).param_groups[0]
            assert group["optim_bits"] == fixed_bits(name)
        wrong = {"Adagrad8bit": 32}.get(name, 40 - fixed_bits(name) if fixed_bits(name) == 32 else 4)
        with pytest.raises(
            ValueError, match=f"{name} always has {fixed_bits(name)}-bit states, got optim_bits={wrong}"
        ):
            build(name, params((2, 2)), optim_bits=wrong)


UNSUPPORTED = [
    ("amsgrad", True), ("centered", True), ("block_wise", False), ("args", SimpleNamespace(block_wise=False)),
    ("args", SimpleNamespace(skip_zeros=True)), ("args", SimpleNamespace(other=1)), ("args", {"optim_bits": 8}),
]  # fmt: skip


@names
@pytest.mark.parametrize(("argument", "value"), UNSUPPORTED, ids=str)
def test_unsupported_arguments_are_named(name, argument, value):
    if argument not in inspect.signature(getattr(optim, name)).parameters:
        with pytest.raises(TypeError, match=argument):
            build(name, params((2, 2)), **{argument: value})
        return
    match = next(iter(vars(value))) if isinstance(value, SimpleNamespace) else argument
    match = "args must have at least one of the attributes optim_bits" if match in ("args", "other") else match
    with pytest.raises(ValueError, match=match):
        build(name, params((2, 2)), **{argument: value})


NUMBERS = (math.nan, math.inf, -0.5, "1", None)
OUT_OF_RANGE = {
    "lr": [*NUMBERS, torch.tensor(math.nan), torch.tensor([1.0, 2.0])],
    "betas": [(math.nan, 0.9), (0.9, math.nan), (1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, 1.5), (0.9,), 0.9, "a, b"],
    "eps": NUMBERS,
    "weight_decay": NUMBERS,
    "momentum": NUMBERS,
    "dampening": [math.nan, math.inf, "1"],
    "alpha": NUMBERS,
    "lr_decay": NUMBERS,
    "initial_accumulator_value": NUMBERS,
    "max_unorm": NUMBERS,
    "t_alpha": [-1, 0.5, "1"],
    "t_beta3": [-1, 0.5, "1"],
    "optim_bits": [4, 16, None, "8"],
    "min_8bit_size": [-1, 0.5, None],
    "min_8bit_vector_size": [-1, 0.5, None],
    "percentile_clipping": [-1, 101, 5.0, None],
    "state_codec": ["nonsense", None, 8],
}


@families
def test_hyperparameters_out_of_range(name):
    """Refused by name, given to the constructor or to a group; every option of a number is among them."""
    taken = inspect.signature(getattr(optim, name)).parameters
    flags = {
        "amsgrad",
        "centered",
        "nesterov",
        "bias_correction",
        "adam_w_mode",
        "trust_clip",
        "args",
        "params",
        *COMMON,
    }
    assert taken.keys() - flags <= OUT_OF_RANGE.keys()
    for option in OUT_OF_RANGE.keys() & taken.keys():
        for value in OUT_OF_RANGE[option]:
            if option == "betas" and name == "AdEMAMix" and isinstance(value, tuple):
                value = (*value, 0.9)
            with pytest.raises(ValueError, match=option):
                build(name, params((2, 2)), **{option: value})
            if option != "args":
                with pytest.raises(ValueError, match=option):
                    build(name, [{"params": params((2, 2)), option: value}])


@pytest.mark.parametrize("name", ["SGD", "LARS", "PytorchLARS"])
def test_nesterov_needs_momentum_alone(name):
    for options in ({"momentum": 0}, {"momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(ValueError, match="nesterov=True needs momentum > 0 and dampening = 0"):
            build(name, params((2, 2)), **{"nesterov": True, **options})
    build(name, params((2, 2)), momentum=0.9, nesterov=True)


@pytest.mark.parametrize("betas", ["(0.5, 0.75)", "0.5,0.75", " [0.5, 0.75] ", [0.5, 0.75], torch.tensor([0.5, 0.75])])
def test_betas_of_a_command_line(betas):
    """bitsandbytes' way of saying it; a list and tensors work, too."""
    betas = tuple(betas) if isinstance(betas, torch.Tensor) else betas
    for optimizer in (AdamW8bit(params((2, 2)), betas=betas), AdamW8bit([{"params": params((2, 2)), "betas": betas}])):
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    three = optim.AdEMAMix(params((2, 2)), betas="(0.9, 0.95, 0.9999)")
    assert three.param_groups[0]["betas"] == (0.9, 0.95, 0.9999)


@names
def test_args(name):
    """Its attributes take the place of arguments, as far as it has them."""
    if "args" not in inspect.signature(getattr(optim, name)).parameters:
        return
    every = SimpleNamespace(
        optim_bits=8, min_8bit_size=100, percentile_clipping=5, block_wise=True, max_unorm=0.0, skip_zeros=False
    )
    group = build(name, params((2, 2)), args=every).param_groups[0]
    assert (group["optim_bits"], group["min_8bit_size"], group["percentile_clipping"]) == (8, 100, 5)
    group = build(name, params((2, 2)), args=SimpleNamespace(min_8bit_size=7)).param_groups[0]
    assert (group["optim_bits"], group["min_8bit_size"]) == (fixed_bits(name) or 32, 7)
    every.max_unorm = 0.5
    if name.startswith(("LAMB", "LARS")):
        assert build(name, params((2, 2)), args=every).param_groups[0]["max_unorm"] == 0.5
    else:
        with pytest.raises(ValueError, match=r"does not support max_unorm=0\.5"):
            build(name, params((2, 2)), args=every)


@names
def test_empty_parameter_list(name):
    with pytest.raises(ValueError, match="empty parameter list"):
        build(name, [])


def test_negative_lr():
    """Refused from a person; a scheduler may arrive a rounding error below zero, and training must not stop there."""
    p = params((64, 80))
    with pytest.raises(ValueError, match="lr"):
        AdamW([{"params": p, "lr": -1.0}])
    optimizer = AdamW(p)
    optimizer.param_groups[0]["lr"] = -1e-20
    train(p, optimizer, range(1))


def test_one_device_a_group():
    """Its parameters go to one operator call."""
    p = [*params((2, 2)), nn.Parameter(torch.zeros(2, 2, device="meta"))]
    with pytest.raises(ValueError, match="parameters on cpu, meta in one group"):
        AdamW8bit(p)
    optimizer = AdamW8bit([{"params": x} for x in p])
    with pytest.raises(ValueError, match="in one group"):
        optimizer.add_param_group({"params": [*params((2, 2)), nn.Parameter(torch.zeros(2, device="meta"))]})
    assert len(optimizer.param_groups) == 2


# ---- state -----------------------------------------------------------------------------------------------------

SHAPES = {
    (64, 64): True, (63, 65): False, (4096,): False, (8192,): False, (1, 4096): True, (2, 3, 700): True, (5, 5): False,
}  # fmt: skip


@names
def test_which_parameters_get_8bit_states(name):
    """Two dimensions or more and at least 4096 elements; absmax by rows."""
    p = params(*SHAPES)
    optimizer = build(name, p)
    train(p, optimizer, range(1))
    for x, (shape, quantized) in zip(p, SHAPES.items(), strict=True):
        state = optimizer.state[x]
        names = optimizer._rule(optimizer.param_groups[0]).state_names
        assert state["step"].shape == () and state["step"].dtype == torch.float32 and state["step"].item() == 1
        if quantized and fixed_bits(name) == 8:
            assert set(state) == {"step", *names, *(f"{n}_absmax" for n in names)}
            dtype, rows = torch.uint8, (shape[0], math.ceil(math.prod(shape[1:]) / 256))
            for n in names:
                assert state[f"{n}_absmax"].shape == rows and state[f"{n}_absmax"].dtype == torch.float32
        else:
            assert set(state) == {"step", *names}
            dtype = torch.float32
        assert all(state[n].shape == shape and state[n].dtype == dtype for n in names)


@pytest.mark.parametrize("name", WITH_8BIT)
def test_optim_bits_and_min_8bit_size(name):
    def is_8bit(shape: tuple[int, ...], **arguments: object) -> bool:
        p = params(shape)
        optimizer = build(name, p, **arguments)
        optimizer.init_state()
        return optimizer.state[p[0]][optimizer._state_names()[0]].dtype == torch.uint8

    assert not is_8bit((64, 64)) and not is_8bit((64, 64), optim_bits=32)
    assert is_8bit((64, 64), optim_bits=8)
    assert not is_8bit((64, 64), optim_bits=8, min_8bit_size=4097)
    assert is_8bit((2, 2), optim_bits=8, min_8bit_size=4)
    assert not is_8bit((), optim_bits=8, min_8bit_size=1)
    if "args" in inspect.signature(getattr(optim, name)).parameters:
        assert is_8bit((2, 50), args=SimpleNamespace(optim_bits=8, min_8bit_size=100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@names
def test_states_are_fp32_or_8bit_whatever_the_parameter(name, dtype):
    p = params(*MIXED, dtype=dtype)
    optimizer = build(name, p, lr=1e-2)
    before = copy.deepcopy(p)
    train(p, optimizer, range(2))
    expected = {torch.float32, torch.uint8} if fixed_bits(name) == 8 else {torch.float32}
    assert {x.dtype for x in flat_state(optimizer).values()} == expected
    assert all(
        x.dtype == dtype and x.isfinite().all() and not torch.equal(x, y) for x, y in zip(p, before, strict=True)
    )


@names
def test_init_state_changes_no_result(name):
    """It fills in what is missing, as the first step would, and keeps what is there."""
    p, q = params(*MIXED), params(*MIXED)
    eager, ready = build(name, p), build(name, q)
    ready.init_state()
    assert all(not x.any() for x in flat_state(ready).values())
    train(p, eager, range(2))
    train(q, ready, range(1))
    ready.init_state()
    train(q, ready, range(1, 2))
    assert_same(p, q)
    assert_same_state(eager, ready)


def test_parameter_groups_have_their_own_options():
    """Each group steps as an optimizer of its own would."""
    options = [{"lr": 1e-2}, {"weight_decay": 0.3, "betas": (0.5, 0.6)}, {"optim_bits": 32, "maximize": True}]
    together, apart = params(*[(64, 80)] * 3), params(*[(64, 80)] * 3)
    one = AdamW8bit([{"params": [p], **o} for p, o in zip(together, options, strict=True)])
    many = [AdamW8bit([{"params": [p], **o}]) for p, o in zip(apart, options, strict=True)]
    for step in range(3):
        set_grads(together, step)
        set_grads(apart, step)
        one.step()
        for optimizer in many:
            optimizer.step()
    assert_same(together, apart)
    assert one.state[together[2]]["exp_avg"].dtype == torch.float32

    extra = params((4, 4))
    one.add_param_group({"params": extra, "lr": 0.0})
    before = extra[0].detach().clone()
    train([*together, *extra], one, range(1))
    assert torch.equal(extra[0], before) and one.state[extra[0]]["step"] == 1


@families
def test_frozen_parameters_and_parameters_without_gradient_are_skipped(name):
    p = params(*MIXED)
    p[0].requires_grad_(False)
    optimizer = build(name, p, lr=1e-2)
    before = copy.deepcopy(p)
    assert optimizer.step() is None
    set_grads(p[2:3], 0)
    optimizer.step()
    assert_same([p[0], p[1], p[3]], [before[0], before[1], before[3]])
    assert not torch.equal(p[2], before[2])
    assert not optimizer.state[p[0]] and not optimizer.state[p[1]]
    optimizer.init_state()
    assert not optimizer.state[p[0]] and optimizer.state[p[1]]["step"] == 0


# ---- against torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_agrees_with_torch(weight_decay, maximize):
    """20 steps of torch.optim.AdamW at rtol 1e-5; near zero, a parameter is measured by the learning rate."""
    ours, theirs = params(*MIXED), params(*MIXED)
    common = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": weight_decay, "maximize": maximize}
    optimizer, reference = AdamW32bit(ours, **common), torch.optim.AdamW(theirs, **common)
    train(ours, optimizer, range(20))
    train(theirs, reference, range(20))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5 * 1e-2)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[p][name], reference.state[q][name], rtol=1e-5, atol=1e-7)


def test_adam_and_adamw_differ_in_their_default_decay_only():
    for adam, adamw in ((Adam, AdamW), (Adam8bit, AdamW8bit), (Adam32bit, AdamW32bit)):
        p, q = params(*MIXED), params(*MIXED)
        train(p, adam(p, weight_decay=1e-2), range(2))
        train(q, adamw(q), range(2))
        assert_same(p, q)

"""bnbops.optim.Adam and its siblings: constructor, which state a parameter gets, agreement with torch."""

import copy
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bnbops.optim import Adam, Adam8bit, Adam32bit, AdamW, AdamW8bit, AdamW32bit
from optimizer_cases import MIXED, assert_same, assert_same_state, flat_state, params, set_grads, train

CLASSES = [Adam, AdamW, Adam8bit, AdamW8bit, Adam32bit, AdamW32bit]
classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
bits_of = {Adam: 32, AdamW: 32, Adam8bit: 8, AdamW8bit: 8, Adam32bit: 32, AdamW32bit: 32}


# ---- constructor -----------------------------------------------------------------------------------------------


@classes
def test_signature_is_bitsandbytes(cls):
    """Names, order and defaults of bitsandbytes 0.50, then keyword-only arguments."""
    decay = 1e-2 if "AdamW" in cls.__name__ else 0
    expected = [
        ("lr", 1e-3), ("betas", (0.9, 0.999)), ("eps", 1e-8), ("weight_decay", decay), ("amsgrad", False),
        ("optim_bits", 32), ("args", None), ("min_8bit_size", 4096), ("is_paged", False),
    ]  # fmt: skip
    named = [(p.name, p.default) for p in inspect.signature(cls).parameters.values()]
    assert named[0][0] == "params"
    assert named[1:10] == expected
    for keyword in ({"percentile_clipping": 100}, {"block_wise": True}, {"maximize": True}):
        cls(params((2, 2)), **keyword)
        with pytest.raises(TypeError):
            cls(params((2, 2)), *(value for _, value in expected), *keyword.values())


@classes
def test_arguments_by_position(cls):
    group = cls(params((2, 2)), 0.5, (0.8, 0.95), 1e-6, 0.3, False, 32, None, 100, False).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.95), 1e-6, 0.3)


@classes
@pytest.mark.parametrize(
    ("argument", "value"),
    [("amsgrad", True), ("is_paged", True), ("percentile_clipping", 5), ("block_wise", False), ("optim_bits", 4)],
)
def test_unsupported_arguments_are_named(cls, argument, value):
    with pytest.raises((ValueError, NotImplementedError), match=argument):
        cls(params((2, 2)), **{argument: value})


@classes
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("lr", x) for x in (math.nan, math.inf, -1e-3, torch.tensor(math.nan), torch.tensor([1.0, 2.0]))],
        *[
            ("betas", x)
            for x in ((math.nan, 0.9), (0.9, math.nan), (1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, 1.5), (0.9,))
        ],
        *[("eps", x) for x in (math.nan, math.inf, -1e-8)],
        *[("weight_decay", x) for x in (math.nan, math.inf, -0.1)],
    ],
    ids=str,
)
def test_hyperparameters_out_of_range(cls, argument, value):
    with pytest.raises(ValueError, match=argument):
        cls(params((2, 2)), **{argument: value})


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", math.nan), ("betas", (0.9, 1.0)), ("eps", math.nan), ("weight_decay", -1.0)],
    ids=str,
)
def test_bad_values_in_a_group_change_nothing(option, value, bits):
    """Whether given to a group or set between steps, a bad value is refused before anything is written."""
    with pytest.raises((ValueError, RuntimeError), match=option.rstrip("s")):
        p = params((64, 80))
        optimizer = AdamW([{"params": p, option: value}], optim_bits=bits)
        train(p, optimizer, range(1))
    p = params((64, 80))
    optimizer = AdamW(p, optim_bits=bits)
    train(p, optimizer, range(1))
    before, state = copy.deepcopy(p), copy.deepcopy(flat_state(optimizer))
    optimizer.param_groups[0][option] = value
    with pytest.raises((ValueError, RuntimeError), match=option.rstrip("s")):
        train(p, optimizer, range(1))
    assert_same(p, before)
    assert_same(list(flat_state(optimizer).values()), list(state.values()))


def test_negative_lr():
    """Refused from a person; a scheduler may arrive a rounding error below zero, and training must not stop there."""
    p = params((64, 80))
    with pytest.raises(ValueError, match="lr"):
        AdamW([{"params": p, "lr": -1.0}])
    optimizer = AdamW(p)
    optimizer.param_groups[0]["lr"] = -1e-20
    train(p, optimizer, range(1))


@classes
def test_empty_parameter_list(cls):
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])


# ---- state -----------------------------------------------------------------------------------------------------


@classes
@pytest.mark.parametrize(
    ("shape", "quantized"),
    [
        ((64, 64), True),
        ((63, 65), False),
        ((4096,), False),
        ((8192,), False),
        ((1, 4096), True),
        ((2, 3, 700), True),
        ((5, 5), False),
    ],
    ids=str,
)
def test_which_parameters_get_8bit_states(cls, shape, quantized):
    """Two dimensions or more and at least 4096 elements; absmax by rows."""
    p = params(shape)
    optimizer = cls(p)
    train(p, optimizer, range(1))
    state = optimizer.state[p[0]]
    assert state["step"].shape == () and state["step"].dtype == torch.float32 and state["step"].item() == 1
    if quantized and bits_of[cls] == 8:
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"}
        dtype, rows = torch.uint8, (shape[0], math.ceil(math.prod(shape[1:]) / 256))
        assert state["exp_avg_absmax"].shape == state["exp_avg_sq_absmax"].shape == rows
        assert state["exp_avg_absmax"].dtype == state["exp_avg_sq_absmax"].dtype == torch.float32
    else:
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        dtype = torch.float32
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == shape
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype


@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_optim_bits_and_min_8bit_size(cls):
    def is_8bit(shape: tuple[int, ...], **arguments: object) -> bool:
        p = params(shape)
        optimizer = cls(p, **arguments)
        optimizer.init_state()
        return optimizer.state[p[0]]["exp_avg"].dtype == torch.uint8

    assert not is_8bit((64, 64)) and not is_8bit((64, 64), optim_bits=32)
    assert is_8bit((64, 64), optim_bits=8)
    assert not is_8bit((64, 64), optim_bits=8, min_8bit_size=4097)
    assert is_8bit((2, 2), optim_bits=8, min_8bit_size=4)
    assert not is_8bit((8192,), optim_bits=8, min_8bit_size=1)
    assert is_8bit((2, 50), args=SimpleNamespace(optim_bits=8, min_8bit_size=100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_states_are_fp32_or_8bit_whatever_the_parameter(dtype):
    p = params(*MIXED, dtype=dtype)
    optimizer = AdamW8bit(p)
    before = copy.deepcopy(p)
    train(p, optimizer, range(2))
    assert {x.dtype for x in flat_state(optimizer).values()} == {torch.float32, torch.uint8}
    assert all(
        x.dtype == dtype and x.isfinite().all() and not torch.equal(x, y) for x, y in zip(p, before, strict=True)
    )


def test_init_state_changes_no_result():
    """It fills in what is missing, as the first step would, and keeps what is there."""
    p, q = params(*MIXED), params(*MIXED)
    eager, ready = AdamW8bit(p), AdamW8bit(q)
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


def test_frozen_parameters_and_parameters_without_gradient_are_skipped():
    p = params(*MIXED)
    p[0].requires_grad_(False)
    optimizer = AdamW8bit(p)
    before = copy.deepcopy(p)
    set_grads(p[2:3], 0)
    optimizer.step()
    assert_same([p[0], p[1], p[3]], [before[0], before[1], before[3]])
    assert not torch.equal(p[2], before[2])
    assert not optimizer.state[p[0]] and not optimizer.state[p[1]]
    optimizer.init_state()
    assert not optimizer.state[p[0]] and optimizer.state[p[1]]["step"] == 0


def test_no_gradient_at_all_is_no_step():
    p = params((4, 4))
    optimizer = AdamW8bit(p)
    assert optimizer.step() is None
    assert torch.equal(p[0], params((4, 4))[0])


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(100, 64, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        AdamW8bit(embedding.parameters()).step()


# ---- against torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_agrees_with_torch(weight_decay, maximize):
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


def test_8bit_follows_32bit():
    """A code is off by up to 7 % of its value, at random: 50 steps away, both are within 5 % of the same place."""
    results = []
    for cls in (AdamW32bit, AdamW8bit):
        p = params((64, 80))
        target = torch.ones(64, 80)
        optimizer = cls(p, lr=1e-2)
        for _ in range(50):
            p[0].grad = p[0].detach() - target
            optimizer.step()
        results.append(p[0].detach() - params((64, 80))[0].detach())
    assert (results[0] - results[1]).norm() / results[0].norm() < 0.05

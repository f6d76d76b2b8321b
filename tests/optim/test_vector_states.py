"""States of vectors: which of them have 8 bits, and what their blocks are."""

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_optimizer_checkpoint import through_torch_save
from torch import nn

from bnbops import optim
from bnbops.distributed import load_checkpoint, save_checkpoint
from bnbops.estimate import estimate
from bnbops.optim import AdamW8bit, GlobalOptimManager
from cases.optimizer_classes import WITH_8BIT, build
from cases.optimizers import assert_same, assert_same_state, params, train

LARGE = 65_536
EIGHT_BITS = {"optim_bits": 8}


def bits(optimizer: optim.Optimizer) -> list[int]:
    """Of each parameter's states."""
    optimizer.init_state()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [8 if any(key.endswith("_absmax") for key in optimizer.state[param]) else 32 for param in params]


@pytest.mark.parametrize("name", WITH_8BIT)
def test_large_vectors_have_8bit_states(name):
    p = params((LARGE,), (LARGE - 1,), (8192,), ())
    optimizer = build(name, p, **EIGHT_BITS)
    assert bits(optimizer) == [8, 32, 32, 32]
    state = optimizer.state[p[0]]
    for key in optimizer._rule(optimizer.param_groups[0]).state_names:
        assert state[key].dtype == torch.uint8 and state[key].shape == (LARGE,)
        assert state[f"{key}_absmax"].shape == (256,)
    assert bits(build(name, params((LARGE,)))) == [32]


# Who gives min_8bit_size, and the vectors' sizes: with each of them the rule is bitsandbytes', even for the default.
GIVEN: dict[str, Any] = {
    "argument": lambda cls, p, size: build(cls, p, min_8bit_size=size, **EIGHT_BITS),
    "args": lambda cls, p, size: build(cls, p, args=SimpleNamespace(optim_bits=8, min_8bit_size=size)),
    "group": lambda cls, p, size: build(cls, [{"params": p, "min_8bit_size": size}], **EIGHT_BITS),
    "vectors of a group": lambda cls, p, size: build(cls, [{"params": p, "min_8bit_vector_size": size}], **EIGHT_BITS),
}


@pytest.mark.parametrize("how", GIVEN)
@pytest.mark.parametrize("name", WITH_8BIT)
def test_min_8bit_size_given_is_for_vectors_too(name, how):
    if how == "args" and "args" not in inspect.signature(getattr(optim, name)).parameters:
        return
    for size in (4096, 100, 1):
        assert bits(GIVEN[how](name, params((size,), (size + 99,), (max(size - 1, 0),)), size)) == [8, 8, 32]
    assert bits(GIVEN[how](name, params((LARGE,)), 100_000)) == [32]


def test_min_8bit_size_of_single_parameters():
    p = params((5000,), (5000,), (5000,), (LARGE,))
    manager = GlobalOptimManager.get_instance()
    manager.override_config(p[0], "min_8bit_size", 4096)
    manager.override_config(p[1], "min_8bit_vector_size", 5000)
    manager.override_config(p[3], "optim_bits", 32)
    optimizer = AdamW8bit(p)
    assert bits(optimizer) == [8, 8, 32, 32]
    train(p, optimizer, range(2))


def test_a_signatures_default_is_not_given():
    """Who reads the default and passes it on has not asked for anything."""
    default = inspect.signature(AdamW8bit).parameters["min_8bit_size"].default
    assert default == 4096 and repr(default) == "4096"
    p = params((8192,), (64, 64))
    for optimizer in (AdamW8bit(p, min_8bit_size=default), optim.AdamW(p, args=SimpleNamespace(min_8bit_size=default))):
        assert {type(value) for key, value in optimizer.param_groups[0].items() if "min_8bit" in key} == {int}
        assert bits(optimizer)[0] == 32


@pytest.mark.parametrize("name", WITH_8BIT)
def test_a_vector_is_stepped_as_a_matrix_of_its_blocks(name):
    """Blocks of 256 elements in a row each: the same codes, scales and parameters."""
    (matrix,) = params((20, 256))
    vector = nn.Parameter(matrix.detach().flatten().clone())
    pairs = [(p, build(name, [p], lr=1e-2, min_8bit_size=1, **EIGHT_BITS)) for p in (matrix, vector)]
    for step in range(3):
        grad = torch.randn(20, 256, generator=torch.Generator().manual_seed(step))
        for p, optimizer in pairs:
            p.grad = grad.view_as(p)
            optimizer.step()
    assert torch.equal(matrix.flatten(), vector)
    state, flat = (optimizer.state[p] for p, optimizer in pairs)
    assert state.keys() == flat.keys() and state[f"{pairs[0][1]._state_names()[0]}_absmax"].dtype == torch.float32
    assert_same([x.flatten() for x in state.values()], [x.flatten() for x in flat.values()])


def test_checkpoints_of_a_former_version():
    """Vectors had 32-bit states, and no option said so. They go on, and so does the rule."""
    p = params((LARGE,), (64, 80), (LARGE,))
    p[2].requires_grad_(False)
    former = AdamW8bit([{"params": p, "min_8bit_vector_size": 2**40}])
    train(p[:2], former, range(2))
    saved = through_torch_save(former.state_dict())
    del saved["param_groups"][0]["min_8bit_vector_size"]

    q = copy.deepcopy(p)
    optimizer = AdamW8bit(q, min_8bit_size=1)
    optimizer.load_state_dict(saved)
    assert bits(optimizer) == [32, 8, 32]
    for parameters, one in ((p, former), (q, optimizer)):
        parameters[2].requires_grad_(True)
        train(parameters, one, range(2, 4))
    assert_same(p, q)
    assert_same_state(former, optimizer)
    fresh = optim.AdamW(params((LARGE,), (64, 80), (LARGE,)))  # 32 bits: the vector does not tell of a cast
    fresh.load_state_dict({**saved, "state": {0: saved["state"][0]}})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_checkpoints_of_a_former_version(tmp_path):
    def model() -> nn.Module:
        return nn.ParameterList(params((LARGE,), (64, 80)))

    p, q = model(), model()
    former = AdamW8bit([{"params": p.parameters(), "min_8bit_vector_size": 2**40}])
    train(list(p), former, range(2))
    rule = former.param_groups[0].pop("min_8bit_vector_size")
    save_checkpoint(p, former, tmp_path / "a")
    former.param_groups[0]["min_8bit_vector_size"] = rule

    optimizer = AdamW8bit(q.parameters())
    load_checkpoint(q, optimizer, tmp_path / "a")
    assert bits(optimizer) == [32, 8]
    for parameters, one in ((p, former), (q, optimizer)):
        train(list(parameters), one, range(2, 4))
    assert_same(list(p), list(q))
    assert_same_state(former, optimizer)


def test_the_rule_is_part_of_a_state_dict():
    p = params((5000,), (64, 80))
    optimizer = AdamW8bit(p, min_8bit_size=4096)
    saved = through_torch_save(optimizer.state_dict())
    fresh = AdamW8bit(p)
    fresh.load_state_dict(saved)
    assert bits(fresh) == [8, 8]


@pytest.mark.parametrize("options", [{}, {"min_8bit_size": 4096}, {"min_8bit_size": 1}], ids=str)
def test_estimate(options):
    module = nn.Module()
    shapes = [(LARGE + 100,), (5000,), (300,), (64, 80)]
    module.all = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    optimizer = AdamW8bit(module.parameters(), **options)
    optimizer.init_state()
    state = [item for state in optimizer.state.values() for item in state.items()]
    found = estimate(module, AdamW8bit, **options).whole
    assert found.scales == sum(x.nbytes for key, x in state if key.endswith("_absmax")) > 0
    assert found.states == sum(x.nbytes for key, x in state if key in ("exp_avg", "exp_avg_sq"))

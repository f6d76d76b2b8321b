"""load_state_dict(move_to_device=False), which bitsandbytes has: states that stay where they were saved."""

import copy

import pytest
import torch
from torch import nn

from bnbops import optim
from bnbops.optim import AdamW8bit
from cases.optimizers import params, train


def on_meta(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW"])
@pytest.mark.parametrize("then", ["step", "init_state", "to_gpu", "deepcopy"])
def test_states_that_stay_where_they_were_saved_until_they_are_needed(name, then):
    """From the CPU to the meta device."""
    saved, shapes = getattr(optim, name)(params((64, 80), (7,))), [(64, 80), (7,)]
    train(saved.param_groups[0]["params"], saved, range(1))
    loaded, moved = getattr(optim, name)(on_meta(shapes)), getattr(optim, name)(on_meta(shapes))
    moved.load_state_dict(saved.state_dict())
    loaded.load_state_dict(saved.state_dict(), move_to_device=False)
    for key, state in loaded.state_dict()["state"].items():
        for what, tensor in state.items():
            original = saved.state_dict()["state"][key][what]
            assert tensor.device.type == "cpu" and torch.equal(tensor, original)
            assert tensor.data_ptr() != original.data_ptr()
    if then == "deepcopy":
        loaded = copy.deepcopy(loaded)
    if then in ("step", "deepcopy"):
        for p in loaded.param_groups[0]["params"]:
            p.grad = torch.empty_like(p)
        loaded.step()
    else:
        getattr(loaded, then)()
    assert all(tensor.is_meta for each in (loaded, moved) for s in each.state.values() for tensor in s.values())
    shapes_of = [{what: (x.shape, x.dtype) for what, x in state.items()} for state in loaded.state.values()]
    assert shapes_of == [{what: (x.shape, x.dtype) for what, x in state.items()} for state in moved.state.values()]


def test_states_of_bitsandbytes_that_stay_where_they_were_saved():
    saved = AdamW8bit(params((64, 80)))
    train(saved.param_groups[0]["params"], saved, range(1))
    loaded = AdamW8bit(on_meta([(64, 80)]))
    loaded.load_state_dict(saved.bitsandbytes_state_dict(), move_to_device=False)
    assert not any(x.is_meta for state in loaded.state.values() for x in state.values())
    loaded.init_state()
    assert all(x.is_meta for state in loaded.state.values() for x in state.values())

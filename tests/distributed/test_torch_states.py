"""States of torch.optim's optimizers over sharded parameters, in ours and back."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from bnbops import optim
from cases.ranks import run_on_ranks
from cases.sharded import MIN_8BIT, assert_same_optimizers, copies, model, set_grads, sharded, whole

CASES = {"AdamW": {"weight_decay": 0.1}, "SGD": {"momentum": 0.9}}


def exchanged(bits: int) -> None:
    """As a single process does it, through optimizers and through torch's functions for sharded models."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, options in CASES.items():
        module = sharded(model(), mesh)
        params, alone = list(module.parameters()), copies(module.parameters())
        theirs, single = (getattr(torch.optim, name)(p, lr=0.01, foreach=False, **options) for p in (params, alone))
        ours, expected, other = (
            getattr(optim, name)(p, lr=0.5, optim_bits=bits, min_8bit_size=MIN_8BIT) for p in (params, alone, params)
        )
        for one, p in ((theirs, params), (single, alone)):
            for step in range(2):
                set_grads(p, step)
                one.step()
        ours.load_state_dict(theirs.state_dict())
        expected.load_state_dict(single.state_dict())
        set_optimizer_state_dict(module, other, get_optimizer_state_dict(module, theirs))
        for one in (ours, other):
            assert_same_optimizers(one, expected)
            assert one.param_groups[0]["lr"] == 0.01 and one.param_groups[0]["optim_bits"] == bits
        kept = [param.detach().clone() for param in params]
        for one, p in ((ours, params), (expected, alone)):
            set_grads(p, 2)
            one.step()
        assert_same_optimizers(ours, expected)

        written, states = ours.torch_state_dict(), expected.torch_state_dict()["state"]
        for key, state in written["state"].items():
            for k, x in state.items():
                assert isinstance(x, DTensor) == (k != "step") and torch.equal(whole(x), states[key][k])
        theirs.load_state_dict(written)
        single.load_state_dict(expected.torch_state_dict())
        for one, p in ((theirs, params), (single, alone)):
            set_grads(p, 3)
            one.step()
        assert_same_optimizers(theirs, single)
        for param, value in zip(params, kept, strict=True):
            assert not torch.equal(param, value)


@pytest.mark.parametrize("bits", [8, 32])
def test_on_two_ranks(bits):
    run_on_ranks(2, exchanged, bits)

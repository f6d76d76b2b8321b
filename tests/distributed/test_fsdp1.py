"""Optimizers refuse what FullyShardedDataParallel (FSDP1) makes of parameters, on every rank."""

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from bnbops.optim import AdamW8bit, AdamW32bit
from cases.ranks import run_on_ranks
from cases.sharded import MIN_8BIT, model

REFUSAL = r"\(FSDP1\) has flattened a parameter.*fully_shard"


def wrapped(module: torch.nn.Module, use_orig_params: bool) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=use_orig_params)


def refused() -> None:
    for use_orig_params in (True, False):
        module = wrapped(model(), use_orig_params)
        for cls in (AdamW8bit, AdamW32bit):
            with pytest.raises(ValueError, match=REFUSAL):
                cls(module.parameters(), min_8bit_size=MIN_8BIT)
            late = cls([torch.nn.Parameter(torch.ones(2, 2))])
            with pytest.raises(ValueError, match=REFUSAL):
                late.add_param_group({"params": list(module.parameters())})
            assert len(late.param_groups) == 1


def refused_later() -> None:
    """The parameters that an optimizer holds are flattened in place."""
    module = model()
    optimizer = AdamW8bit(module.parameters(), lr=1.0)
    module = wrapped(module, use_orig_params=True)
    module(torch.randn(4, 300)).sum().backward()
    before = [param.detach().clone() for param in module.parameters()]
    with pytest.raises(ValueError, match=REFUSAL):
        optimizer.step()
    with pytest.raises(ValueError, match=REFUSAL):
        optimizer.init_state()
    with pytest.raises(ValueError, match=REFUSAL):
        optimizer.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, module.parameters(), before)) and not optimizer.state


@pytest.mark.parametrize("check", [refused, refused_later])
def test_fsdp1(check):
    run_on_ranks(2, check)

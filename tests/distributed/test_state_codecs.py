"""Sharded states of any codecs: steps are those of one process, and states go from any sharding to any other."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from bnbops.facts import UNCODED
from bnbops.optim import AdamW8bit
from cases.codecs import ADAM, CHOICES, codec_in, option
from cases.optimizers import params
from cases.ranks import run_on_ranks
from cases.sharded import MIN_8BIT, assert_same_optimizers, copies, model, set_grads, sharded, whole

pytestmark = pytest.mark.every_torch


def taking_steps(p: list[nn.Parameter], choice: str, steps: int = 2, **options: Any) -> AdamW8bit:
    optimizer = AdamW8bit(p, lr=0.01, min_8bit_size=MIN_8BIT, state_codec=option(choice), **options)
    for step in range(steps):
        set_grads(p, step)
        optimizer.step()
    return optimizer


def under_fsdp() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for choice in CHOICES:
        for options in ({}, {"is_paged": True, "percentile_clipping": 50}):
            p, q = list(model().parameters()), list(sharded(model(), mesh).parameters())
            assert_same_optimizers(taking_steps(q, choice, **options), taking_steps(p, choice, **options))


def placed_otherwise() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = params((65, 80), (130,), (64, 512))

    def on(*placement: Any) -> list[nn.Parameter]:
        return [nn.Parameter(distribute_tensor(x.detach(), mesh, placement) if placement else x.detach()) for x in p]

    for choice in CHOICES:
        expected = taking_steps(on(), choice)
        for source in (expected, taking_steps(on(Shard(0)), choice), taking_steps(on(Replicate()), choice)):
            for placement in (Shard(0), Replicate()):
                target = taking_steps(on(placement), "fp32")
                target.load_state_dict(source.state_dict())
                for x, y in zip(target.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True):
                    x.data.copy_(distribute_tensor(y.detach(), mesh, [placement]))
                assert_same_optimizers(target, expected)


def cut_within_blocks() -> None:
    """States of 32 bits have the values that the codes stand for."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for choice in CHOICES:
        weight = nn.Parameter(torch.ones(16, 640))
        saved = taking_steps([weight], choice)
        cut = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(1)]))
        target = AdamW8bit([cut], min_8bit_size=MIN_8BIT)
        target.load_state_dict(saved.state_dict())
        for name in ADAM:
            assert codec_in(target.state[cut], name) == UNCODED
            assert torch.equal(whole(target.state[cut][name]), saved.dequantized_state(weight)[name])


def by_values() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for choice in CHOICES:
        module = sharded(model(), mesh)
        q, p = list(module.parameters()), copies(module.parameters())
        found, expected = taking_steps(q, choice), taking_steps(p, choice)
        for x, y in zip(q, p, strict=True):
            values = expected.dequantized_state(y)
            for key, value in found.dequantized_state(x).items():
                assert torch.equal(whole(value), values[key])
            mask = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.5
            for optimizer, param in ((found, x), (expected, y)):
                optimizer.reset_state(param, mask)
                optimizer.set_state(param, exp_avg_sq=values["exp_avg_sq"] * 0.5)
        assert_same_optimizers(found, expected)


@pytest.mark.parametrize("check", [under_fsdp, placed_otherwise, cut_within_blocks, by_values])
def test_on_two_ranks(check):
    run_on_ranks(2, check)

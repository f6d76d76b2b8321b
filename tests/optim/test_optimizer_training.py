"""The optimizer classes inside training loops: gradient scaling, memory formats.

Closures and hooks are in test_torch_conventions.py, schedulers in test_lr_schedulers.py.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from bnbops.optim import AdamW8bit, AdamW32bit
from cases.optimizers import MIXED, assert_same, assert_same_state, flat_state, params, set_grads, train


def test_zero_grad():
    p = params((4, 4), (5,))
    optimizer = AdamW8bit(p)
    set_grads(p, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(x.grad is not None and not x.grad.any() for x in p)
    optimizer.zero_grad()
    assert all(x.grad is None for x in p)


@pytest.mark.parametrize("cls", [AdamW8bit, AdamW32bit])
def test_autograd_notices_the_step(cls):
    """A backward that needs the old parameter must fail instead of using the new one."""
    p = params((64, 80))
    optimizer = cls(p)
    loss = p[0].square().sum()
    train(p, optimizer, range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensor_lr_is_a_float_lr(dtype):
    p, q = params(*MIXED), params(*MIXED)
    lr = torch.tensor(2.0**-8, dtype=dtype)
    tensor, number = AdamW8bit(p, lr=lr), AdamW8bit(q, lr=2.0**-8)
    train(p, tensor, range(3))
    train(q, number, range(3))
    assert_same(p, q)
    assert lr.item() == 2.0**-8 and isinstance(tensor.param_groups[0]["lr"], Tensor)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cls", [AdamW8bit, AdamW32bit], ids=lambda cls: cls.__name__)
def test_grad_scaler(cls, fused):
    """Scaled gradients give the steps of unscaled ones; an overflow skips the step and counts none."""
    p, q = params((64, 80)), params((64, 80))
    scaled, plain = cls(p), cls(q)
    scaled.fused_scaling = fused
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0, growth_interval=1000)
    for _ in range(3):
        scaled.zero_grad()
        scaler.scale(p[0].square().sum()).backward()
        scaler.step(scaled)
        scaler.update()
        plain.zero_grad()
        q[0].square().sum().backward()
        plain.step()
    assert_same(p, q)
    assert_same_state(scaled, plain)

    before, state = copy.deepcopy(p), copy.deepcopy(flat_state(scaled))
    scaled.zero_grad()
    scaler.scale(p[0].square().sum() * math.inf).backward()
    scaler.step(scaled)
    scaler.update()
    assert_same(p, before)
    assert_same(list(flat_state(scaled).values()), list(state.values()))
    assert scaler.get_scale() == 512.0

    scaled.zero_grad()  # and goes on after an explicit unscale_
    plain.zero_grad()
    scaler.scale(p[0].square().sum()).backward()
    scaler.unscale_(scaled)
    scaler.step(scaled)
    q[0].square().sum().backward()
    plain.step()
    assert_same(p, q)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "padded": lambda x: nn.functional.pad(x, (2, 3))[..., 2:-3],
}


@pytest.mark.parametrize("cls", [AdamW8bit, AdamW32bit], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_any_strides_train_alike(layout, cls):
    p = params((16, 8, 9, 5))
    q = [nn.Parameter(LAYOUTS[layout](p[0].detach().clone()))]
    assert not q[0].is_contiguous() and q[0].stride() != p[0].stride()
    pointer = q[0].data_ptr()
    ours, theirs = cls(q), cls(p)
    for step in range(3):
        set_grads(p, step)
        q[0].grad = LAYOUTS[layout](p[0].grad.clone())
        ours.step()
        theirs.step()
    assert_same(p, q)
    assert q[0].data_ptr() == pointer
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(ours.state[q[0]][name], theirs.state[p[0]][name])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_bf16_network_learns(memory_format):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 10))
    net = net.to(torch.bfloat16).to(memory_format=memory_format)
    x, y = torch.randn(32, 3, 8, 8).bfloat16(), torch.arange(32) % 10
    optimizer = AdamW8bit(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(net(x).float(), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4
    assert {x.dtype for x in flat_state(optimizer).values()} == {torch.uint8, torch.float32}

"""Steps through a transform: a direction, what Python makes of it, and the step along that."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import bnbops
from bnbops.optim import LAMB8bit, Optimizer
from bnbops.optim.core import transform
from cases.compiled import batches, make_model, usual_step
from cases.optimizers import MIXED, params, set_grads, train
from cases.ranks import run_on_ranks
from cases.sharded import MIN_8BIT, assert_same_optimizers, copies, model, sharded
from cases.sharded import set_grads as set_sharded_grads
from cases.transforms import OrthogonalSGD, orthogonal

LR, MOMENTUM = 0.125, 0.5


def built(p: list[nn.Parameter], **options: object) -> OrthogonalSGD:
    return OrthogonalSGD(p, lr=LR, momentum=MOMENTUM, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_along_what_the_transform_returns(dtype):
    p = params(*MIXED, dtype=dtype)
    q = [x.detach().float() for x in p]
    optimizer, buffers = built(p), [torch.zeros_like(x) for x in q]
    for step in range(3):
        set_grads(p, step)
        optimizer.step()
        for x, buffer, expected in zip(p, buffers, q, strict=True):
            buffer.mul_(MOMENTUM).add_(x.grad.float())
            expected.copy_((expected - LR * orthogonal(buffer)).to(dtype))
            torch.testing.assert_close(
                x.detach().float(), expected, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6
            )
            torch.testing.assert_close(optimizer.state[x]["momentum_buffer"], buffer, rtol=1e-6, atol=1e-7)
            assert optimizer.state[x]["step"] == step + 1


def test_elements_without_a_finite_gradient_are_left_alone():
    p = params((8, 12))
    optimizer = built(p)
    train(p, optimizer, range(1))
    before, buffer = p[0].detach().clone(), optimizer.state[p[0]]["momentum_buffer"].clone()
    set_grads(p, 1)
    p[0].grad[2, 3], p[0].grad[5, 0] = torch.inf, torch.nan
    kept = ~p[0].grad.isfinite()
    optimizer.step()
    assert torch.equal(p[0] == before, kept)
    assert torch.equal(optimizer.state[p[0]]["momentum_buffer"] == buffer, kept)


def test_overflows_change_nothing_and_scales_are_divided_out():
    p = params((64, 80), (5, 7))
    q = copy.deepcopy(p)
    one, other = built(p, optim_bits=8), built(q, optim_bits=8)
    one.grad_scale, one.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    for step in range(2):
        set_grads(p, step)
        set_grads(q, step)
        for x in p:
            x.grad.mul_(4)
        one.step()
        other.step()
    assert_same_optimizers(one, other)
    one.found_inf = torch.tensor(1.0)
    one.step()
    assert_same_optimizers(one, other)


@pytest.mark.parametrize("make", [built, lambda p, **options: LAMB8bit(p, lr=LR, **options)], ids=["whole", "LAMB"])
def test_parameters_are_taken_in_runs(make: Callable[..., Optimizer], monkeypatch):
    """With the same result, and few directions at once; clipping and ratios follow their parameters."""
    runs, most = [], []
    for largest in (transform.LARGEST_RUN, 6000):
        monkeypatch.setattr(transform, "LARGEST_RUN", largest)
        seen: list[list[int]] = []
        usual = transform._transformed

        def record(by: object, run: transform.Run, usual=usual, seen=seen) -> transform.Along:
            seen.append([x.numel() for x in run.directions])
            return usual(by, run)

        monkeypatch.setattr(transform, "_transformed", record)
        p = params((64, 80), (5, 7), (70, 100), (130,), (3, 40, 40), (8, 9))
        optimizer = make(p, percentile_clipping=50)
        train(p, optimizer, range(2))
        monkeypatch.setattr(transform, "_transformed", usual)
        runs.append(optimizer)
        most.append(max(sum(sizes) for sizes in seen))
        assert sum(map(len, seen)) == 2 * len(p)
    assert_same_optimizers(runs[1], runs[0])
    assert most[1] == 7000 < most[0]


def test_refused_before_any_state_has_moved():
    """By the first call, too, whose operator checks half of it."""
    p = params((8, 12))
    optimizer = LAMB8bit(p, lr=LR)
    train(p, optimizer, range(1))
    p[0].grad = p[0].detach()  # which the second half would write
    before = [p[0].detach().clone(), *(x.clone() for x in optimizer.state[p[0]].values())]
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()
    after = [p[0].detach(), *optimizer.state[p[0]].values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_versions_and_strides():
    """autograd notices the step, and parameters that are not contiguous get it."""
    p = params((6, 10), (4, 5, 6, 7))
    q = [
        nn.Parameter(p[0].detach().t().contiguous().t()),
        nn.Parameter(p[1].detach().to(memory_format=torch.channels_last)),
    ]
    versions = [x._version for x in q]
    one, other = built(p), built(q)
    for parameters, optimizer in ((p, one), (q, other)):
        set_grads(parameters, 0)
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(p, q, strict=True))
    assert all(x._version > version for x, version in zip(q, versions, strict=True))


def test_compiled_steps_are_the_usual_ones():
    results = []
    for compiled in (False, True):
        module = make_model()
        optimizer = OrthogonalSGD(module.parameters(), lr=LR, momentum=MOMENTUM, optim_bits=8, percentile_clipping=50)
        step = usual_step(module, optimizer)
        step = bnbops.compiled_train_step(step, optimizer, backend="aot_eager") if compiled else step
        for i, (x, y) in enumerate(batches(3)):
            optimizer.param_groups[0]["lr"] = LR / (i + 1)
            step(x, y)
        results.append(optimizer)
    assert_same_optimizers(results[1], results[0])


def sharded_steps() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for make in (built, lambda p, **options: LAMB8bit(p, lr=LR, **options)):
        for options in ({"optim_bits": 8} if make is built else {}, {"percentile_clipping": 50}):
            q = [*sharded(model(), mesh).parameters()]
            q.append(nn.Parameter(distribute_tensor(torch.ones(3, 1024), mesh, [Shard(1)])))
            p = copies(q)
            one, other = make(q, min_8bit_size=MIN_8BIT, **options), make(p, min_8bit_size=MIN_8BIT, **options)
            for step in range(2):
                for parameters, optimizer in ((q, one), (p, other)):
                    set_sharded_grads(parameters, step)
                    optimizer.step()
            assert_same_optimizers(one, other)


def test_sharded_steps_are_those_of_one_process():
    run_on_ranks(2, sharded_steps)

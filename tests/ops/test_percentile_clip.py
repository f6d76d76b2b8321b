"""percentile_clip_ against a plain sort (reference/norms.py)."""

import math
import re

import pytest
import torch
from torch import Tensor

from cases.backends import on_every_backend
from cases.rules import assert_same
from reference import norms
from reference.group import Group, random_group


def clip_(history: list[Tensor], squares: Tensor, steps: list[Tensor], percentile: int, **scaling: Tensor) -> Tensor:
    return torch.ops.bnbops.percentile_clip_(history, squares, steps, percentile=percentile, **scaling)


@on_every_backend
@pytest.mark.parametrize("scale", [None, 1.0, 3.0, 65536.0])
@pytest.mark.parametrize("percentile", [0, 1, 5, 50, 99])
def test_percentile_clipping_over_many_steps(percentile, scale):
    """Three parameters that are at different steps, with spikes of their own, until the history has wrapped around."""
    generator = torch.Generator().manual_seed(percentile)
    history = [torch.zeros(100) for _ in range(3)]
    expected_history: list[list[float]] = [[0.0] * 100 for _ in range(3)]
    steps = [torch.zeros(()), torch.tensor([0.0]), torch.zeros(())]
    scaling = {} if scale is None else {"grad_scale": torch.tensor(scale), "found_inf": torch.tensor(0.0)}
    for _ in range(230):
        squares = torch.rand(3, generator=generator, dtype=torch.float64) * 100
        squares[torch.rand(3, generator=generator) < 0.05] *= 1e6
        clip = clip_(history, squares * (scale or 1.0) ** 2, steps, percentile, **scaling)
        assert clip.dtype == torch.float32 and clip.shape == (3,)
        for i, square in enumerate(squares.tolist()):
            t = int(steps[i].item()) + 1
            expected_history[i], factor = norms.percentile_clip(expected_history[i], square, t, percentile)
            torch.testing.assert_close(history[i], torch.tensor(expected_history[i]), rtol=1e-6, atol=0)
            assert clip[i].item() == pytest.approx(factor, rel=1e-6)
        for i, step in enumerate(steps):
            step += i % 2 + 1  # the second skips every other place of the history


def test_clipped_gradients_are_as_long_as_the_percentile():
    """What the factor is for."""
    history, norm = [torch.arange(100.0)], torch.tensor([1e8], dtype=torch.float64)
    clip = clip_(history, norm, [torch.tensor(6.0)], 40)
    assert history[0][7] == 1e8
    # 7 gave way to 1e8, so that the 40th smallest is 41
    assert (norm.sqrt() * clip).item() == pytest.approx(math.sqrt(41.0))


@on_every_backend
def test_clip_is_1_at_the_first_step_and_for_zero():
    for squares in (torch.tensor([5.0, 0.0]).double(), torch.zeros(2).double()):
        history = [torch.rand(100), torch.rand(100)]
        assert torch.equal(clip_(history, squares, [torch.zeros(()), torch.zeros(())], 5), torch.ones(2))
        assert all((h == x).all() for h, x in zip(history, squares, strict=True))
    history = [torch.rand(100)]
    assert clip_(history, torch.zeros(1).double(), [torch.tensor(8.0)], 5) == 1.0 and history[0][9] == 0.0


@on_every_backend
def test_clip_is_0_where_the_percentile_is():
    history = [torch.zeros(100)]
    assert clip_(history, torch.ones(1).double(), [torch.tensor(8.0)], 5) == 0.0


@on_every_backend
def test_norms_beyond_fp32_stay_usable():
    """A squared norm larger than any float clips well and leaves a finite history."""
    history = [torch.full((100,), 4.0)]
    clip = clip_(history, torch.tensor([1e60], dtype=torch.float64), [torch.tensor(8.0)], 5)
    assert 0 < clip.item() < 1e-18 and history[0].isfinite().all()


@on_every_backend
def test_found_inf_keeps_the_history():
    history = [torch.rand(100), torch.rand(100)]
    before = [h.clone() for h in history]
    squares, steps = torch.tensor([1e9, 1e9], dtype=torch.float64), [torch.zeros(()), torch.tensor(5.0)]
    clip = clip_(history, squares, steps, 5, found_inf=torch.tensor([1.0]), grad_scale=torch.tensor([2.0]))
    assert torch.equal(clip, torch.ones(2))
    assert all(torch.equal(x, y) for x, y in zip(before, history, strict=True))


@on_every_backend
def test_no_parameters():
    assert clip_([], torch.zeros(0).double(), [], 5).shape == (0,)


SHARED = torch.rand(100)
BAD_CLIPPING = {
    **{f"percentile {x}": ({"percentile": x}, f"percentile must be in [0, 100), got {x}") for x in (-1, 100)},
    "a step missing": ({"steps": [torch.zeros(())]}, "steps has 1 tensors for 2"),
    "float64 history": ({"gnorm_vec": [torch.rand(100), torch.rand(100).double()]}, "gnorm_vec[1] must be float32"),
    "short history": ({"gnorm_vec": [torch.rand(100), torch.rand(99)]}, "gnorm_vec[1] must have shape [100]"),
    "strided history": ({"gnorm_vec": [torch.rand(200)[::2], torch.rand(100)]}, "gnorm_vec[0] must be contiguous"),
    "history of two parameters": ({"gnorm_vec": [SHARED, SHARED]}, "share memory"),
    "fp32 norms": ({"squared_norms": torch.ones(2)}, "squared_norms must be float64"),
    "too many norms": ({"squared_norms": torch.ones(3).double()}, "squared_norms must have shape [2]"),
    "integer step": ({"steps": [torch.zeros(()), torch.tensor(1)]}, "steps[1] must be float32"),
    "two steps": ({"steps": [torch.zeros(2), torch.zeros(())]}, "steps[0] must have one element"),
    **{
        f"step {x}": ({"steps": [torch.zeros(()), torch.tensor(x)]}, "steps[1] must be finite and not negative")
        for x in (-1.0, -7.0, math.nan, math.inf)
    },
    **{
        f"grad_scale {x}": ({"grad_scale": torch.tensor(x)}, "grad_scale must be positive and finite")
        for x in (0.0, -2.0, math.nan, math.inf)
    },
    **{
        f"squared norm {x}": (
            {"squared_norms": torch.tensor([1.0, x]).double()},
            "squared_norms[1] must be finite and not negative",
        )
        for x in (-1.0, math.nan, math.inf)
    },
    "two scales": ({"grad_scale": torch.ones(2)}, "grad_scale must have one element"),
    "boolean found_inf": ({"found_inf": torch.tensor(True)}, "found_inf must be float32"),
}


@pytest.mark.parametrize("case", BAD_CLIPPING)
def test_percentile_clipping_refuses(case):
    changed, message = BAD_CLIPPING[case]
    good = {
        "gnorm_vec": [torch.rand(100), torch.rand(100)],
        "squared_norms": torch.ones(2).double(),
        "steps": [torch.tensor(3.0), torch.tensor(4.0)],
        "percentile": 5,
    }
    arguments = good | changed
    before = [x.clone() for x in arguments["gnorm_vec"]]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.bnbops.percentile_clip_(**arguments)
    assert all(torch.equal(x, y) for x, y in zip(before, arguments["gnorm_vec"], strict=True))
    torch.ops.bnbops.percentile_clip_(**good)


@on_every_backend
def test_clip_and_step_work_together():
    """The factor of one operator is what the other takes."""
    group = random_group("sgd", [(5, 300), (64,)], bits=32)
    history = [torch.full((100,), 1e-4), torch.full((100,), 1e9)]
    clip = clip_(history, torch.ops.bnbops.squared_norms(group.grads), group.steps, 50)
    assert clip[0] < 1 and clip[1] == 1
    by_hand = group.clone().with_grads([g * c for g, c in zip(group.grads, clip, strict=True)])
    group.step(clip=clip)
    by_hand.step()
    torch.testing.assert_close(group.params, by_hand.params)
    torch.testing.assert_close((by_hand.grads[0].norm() ** 2).item(), 1e-4)
    assert_same(group.with_grads(by_hand.grads), Group("sgd", group.params, by_hand.grads, steps=by_hand.steps))

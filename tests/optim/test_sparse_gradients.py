"""Steps with 8-bit states after gradients that are often zero and of very different sizes, as behind a ReLU.

A second moment that is rounded to 0 would be divided by in the next step, where no gradient brings it back.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bnbops import optim

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]  # where Python looks when it runs the scripts
SETTINGS = importlib.import_module("convergence").SETTINGS


def updates(cls: type[optim.Optimizer], options: dict, steps: int = 20) -> list[Tensor]:
    """What each step adds to a parameter. Half of a gradient's elements are zero, the others span five decades."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(0.1 * torch.randn(64, 256, generator=generator))
    scale = 10 ** torch.empty(p.shape).uniform_(-5, 0, generator=generator)
    optimizer, found = cls([p], lr=1e-3, **options), []
    for _ in range(steps):
        kept = torch.rand(p.shape, generator=generator) < 0.5
        p.grad = torch.randn(p.shape, generator=generator) * scale * kept
        before = p.detach().clone()
        optimizer.step()
        found.append((p.detach() - before).flatten())
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_about_those_of_32bit_states(name):
    """As long, or shorter by what tiny second moments are rounded up; never longer. In about the same direction."""
    family, options = SETTINGS[name].optimizer, SETTINGS[name].options
    full = updates(getattr(optim, f"{family}32bit"), options)
    for step, (expected, found) in enumerate(zip(full, updates(getattr(optim, f"{family}8bit"), options), strict=True)):
        ratio = (found.norm() / expected.norm()).item()
        assert 0.75 < ratio < 1.05, f"step {step + 1} is {ratio:.3g} times as long"
        assert torch.cosine_similarity(found, expected, dim=0) > 0.82

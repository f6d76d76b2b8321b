"""States that are not there yet, states that are placed otherwise, and those of bitsandbytes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from bnbops import functional
from bnbops.distributed import load_checkpoint, save_checkpoint
from bnbops.nn import Linear4bit
from bnbops.optim import AdamW8bit
from cases.dcp import Run, assert_equal, unchanged
from cases.interchange import SHAPES, fresh
from cases.optimizers import params
from cases.ranks import run_on_ranks
from cases.sharded import MIN_8BIT, assert_same_optimizers, placed_as, set_grads, whole
from reference.group import CODEBOOK_OF

pytestmark = pytest.mark.every_torch

GOLDEN = Path(__file__).parent.parent / "golden"


def step(run: Run, number: int, without: tuple[int, ...] = ()) -> None:
    """A step in which some parameters have no gradient."""
    parameters = list(run.model.parameters())
    set_grads(parameters, number)
    for i in without:
        parameters[i].grad = None
    run.optimizer.step()
    run.optimizer.zero_grad()


# ---- no state yet ----------------------------------------------------------------------------------------------------


def never_a_gradient(folder: Path) -> None:
    """Parameters without a gradient so far, one of them frozen, have no state: neither then nor after loading."""
    run = Run("AdamW8bit")
    list(run.model.parameters())[4].requires_grad_(False)
    step(run, 0, without=(0, 3, 4))
    save_checkpoint(run.model, run.optimizer, folder / "a")
    for prepare in (lambda other: None, lambda other: other.optimizer.init_state(), lambda other: step(other, 7)):
        other = Run("AdamW8bit", seed=1)
        prepare(other)
        load_checkpoint(other.model, other.optimizer, folder / "a")
        assert_equal(other.tensors(), run.tensors())
    list(other.model.parameters())[4].requires_grad_(False)
    for one in (run, other):
        step(one, 1, without=(4,))
    assert_equal(other.tensors(), run.tensors())
    steps = [state["step"].item() for state in run.optimizer.state_dict()["state"].values()]
    assert sorted(steps) == [1.0] * 2 + [2.0] * (len(steps) - 2)


def getting_a_state_dict_counts_no_step(_folder: Path) -> None:
    """torch steps an optimizer without state, with gradients and lr of 0, to have something to save or load into."""
    for name in ("AdamW8bit", "LAMB8bit", "SGD8bit"):
        run, other = Run(name), Run(name)
        before = run.tensors()
        get_state_dict(run.model, run.optimizer)
        found = run.tensors()
        assert all(torch.equal(found[key], x) for key, x in before.items())
        assert all(found[key] == 0 for key in found if key.endswith("step"))
        assert all(found[key].isinf().all() for key in found if key.endswith("gnorm_vec"))
        assert [float(group["lr"]) for group in run.optimizer.param_groups] == pytest.approx([0.01, 0.02])
        for one in (run, other):
            one.train(range(3))
        assert_equal(run.tensors(), other.tensors())


def real_steps_with_lr_0_count(_folder: Path) -> None:
    """As a warmup begins, on a rank whose shards of the gradients are 0, too."""
    run = Run("AdamW8bit")
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    for param in run.model.parameters():
        grad = torch.zeros(param.shape)
        grad[0] = 1
        param.grad = placed_as(grad, param)
    run.optimizer.step()
    assert {state["step"].item() for state in run.optimizer.state.values()} == {1.0}


# ---- placed otherwise ------------------------------------------------------------------------------------------------


def steps_of(place: Any) -> tuple[AdamW8bit, list[nn.Parameter]]:
    """An optimizer of parameters that `place` has sharded or not, after two steps."""
    p = [nn.Parameter(place(x.detach())) for x in params((65, 80), (130,), (64, 512))]
    optimizer = AdamW8bit(p, min_8bit_size=MIN_8BIT)
    for number in range(2):
        set_grads(p, number)
        optimizer.step()
    return optimizer, p


def state_dict_with(optimizer: AdamW8bit, change: Any) -> dict[str, Any]:
    state_dict = optimizer.state_dict()
    states = {i: {key: change(x) for key, x in state.items()} for i, state in state_dict["state"].items()}
    return {**state_dict, "state": states}


def other_placements(_folder: Path) -> None:
    """Whole states, and ones sharded otherwise, become sharded as their parameters are: bit for bit."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected = steps_of(lambda x: x)[0]
    by_rows, replicated = (steps_of(lambda x, p=p: distribute_tensor(x, mesh, [p]))[0] for p in (Shard(0), Replicate()))
    for source in (expected, by_rows, replicated):
        for placement in (Shard(0), Replicate()):
            target, p = steps_of(lambda x, q=placement: distribute_tensor(x, mesh, [q]))
            target.load_state_dict(source.state_dict())
            assert_same_optimizers(target, expected)
            set_grads(p, 5)
            target.step()
    for source in (expected, replicated):
        target = steps_of(lambda x: x)[0]
        target.load_state_dict(source.state_dict())
        assert_same_optimizers(target, expected)

    def on_another_mesh(x: Tensor) -> Tensor:
        return distribute_tensor(x.full_tensor(), other, [Replicate(), Shard(0)]) if isinstance(x, DTensor) else x

    def partial(x: Tensor) -> Tensor:
        return DTensor.from_local(x.full_tensor(), mesh, [Partial()], run_check=False) if isinstance(x, DTensor) else x

    other = init_device_mesh("cpu", (1, dist.get_world_size()))
    whole_optimizer = steps_of(lambda x: x)[0]
    for optimizer, state_dict, message in (
        (whole_optimizer, by_rows.state_dict(), r"'exp_avg' is sharded \(.*\), but not its parameter .* full_tensor"),
        (by_rows, state_dict_with(by_rows, on_another_mesh), r"'exp_avg' is sharded over .* full_tensor\(\)"),
        (by_rows, state_dict_with(by_rows, partial), "'exp_avg' is a partial sum"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state_dict)
        assert_same_optimizers(optimizer, expected)


# ---- from elsewhere --------------------------------------------------------------------------------------------------


def from_bitsandbytes(_folder: Path) -> None:
    """Rows of whole blocks keep their bytes; other flat blocks become 32-bit states of the values they stand for."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cases = [(f"{name}_float32", Shard(0)) for name in ("AdamW8bit", "AdEMAMix8bit", "AdamW32bit")]
    for name, placement in [*cases, ("AdamW8bit_float32", Shard(1))]:  # which cuts every row of blocks
        saved = torch.load(GOLDEN / f"opt_{name}.state_dict.pt", weights_only=True)
        expected, p = fresh(name)
        expected.load_state_dict(saved)
        q = [nn.Parameter(distribute_tensor(x.detach(), mesh, [placement if x.dim() > 1 else Shard(0)])) for x in p]
        optimizer = type(expected)(q)
        optimizer.load_state_dict(saved)
        for shape, x, y in zip(SHAPES, p, q, strict=True):
            wanted, found = expected.state[x], {key: whole(t) for key, t in optimizer.state[y].items()}
            cut = math.prod(shape[1:]) % 256 or placement == Shard(1)
            if cut and "exp_avg_absmax" in wanted:
                wanted = {"step": wanted["step"]} | {
                    key: functional.dequantize_blockwise(
                        wanted[key], absmax=wanted[f"{key}_absmax"], code=code, blocksize=256
                    )
                    for key, code in CODEBOOK_OF.items()
                    if key in wanted
                }
            assert_equal(found, wanted)
        set_grads(q, 0)
        optimizer.step()


def layers_of_4_bits(folder: Path) -> None:
    def lora(seed: int) -> Run:
        torch.manual_seed(seed)
        base = Linear4bit(300, 320, bias=False, compute_dtype=torch.float32).to("cpu")
        module = nn.Sequential(base, nn.Linear(320, 300), nn.LayerNorm(300))
        run = Run.__new__(Run)
        run.model = module
        run.optimizer = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
        return run

    run, other = lora(0), lora(1)
    for one in (run, other):
        one.model(torch.ones(2, 300)).square().sum().backward()
        one.optimizer.step()
    save_checkpoint(run.model, run.optimizer, folder / "lora")
    load_checkpoint(other.model, other.optimizer, folder / "lora")
    assert_equal(other.tensors() | other.model.state_dict(), run.tensors() | run.model.state_dict())


@pytest.mark.parametrize(
    "check",
    [
        never_a_gradient,
        getting_a_state_dict_counts_no_step,
        real_steps_with_lr_0_count,
        other_placements,
        from_bitsandbytes,
        layers_of_4_bits,
    ],
)
def test_on_two_ranks(check, tmp_path):
    run_on_ranks(2, check, tmp_path)


def load_on_ranks(folder: Path) -> dict[str, Tensor]:
    run = Run("AdamW8bit", seed=1)
    extra = load_checkpoint(run.model, run.optimizer, folder / "a")
    assert extra == {"milestones": {1: 2}, "empty": {}, "x": torch.tensor(1)}
    return run.tensors()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_without_a_process_group(tmp_path):
    run = Run("AdamW8bit", shard=False)
    run.train(range(2))
    save_checkpoint(
        run.model, run.optimizer, tmp_path / "a", extra={"milestones": {1: 2}, "empty": {}, "x": torch.tensor(1)}
    )
    for tensors in run_on_ranks(2, load_on_ranks, tmp_path):
        assert_equal(tensors, run.tensors())
    other = Run("AdamW8bit", shard=False, seed=1)
    load_checkpoint(other.model, other.optimizer, str(tmp_path / "a"))
    assert_equal(other.tensors(), run.tensors())
    with unchanged(other), pytest.raises(RuntimeError, match="is no checkpoint"):
        load_checkpoint(other.model, other.optimizer, tmp_path / "b")

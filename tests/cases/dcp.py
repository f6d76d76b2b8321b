"""Training that stops and goes on: on other ranks, and through every way that torch has to save and load."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from bnbops.distributed import SafeLoadPlanner, load_checkpoint, save_checkpoint
from cases.codecs import OTHER, as_bytes
from cases.optimizer_classes import build
from cases.sharded import MIN_8BIT, model, sharded, tensors_of, whole
from reference import states
from reference.group import CODEBOOKS

CASES: dict[str, dict[str, Any]] = {
    "AdamW8bit": {"percentile_clipping": 50},
    "AdamW8bit, codecs": {"state_codec": {"exp_avg": OTHER, "exp_avg_sq": "fp32"}},
    "AdamW32bit": {},
    "AdEMAMix8bit": {"t_alpha": 10, "t_beta3": 10},
    "PagedAdamW8bit": {},
    "SGD8bit": {"momentum": 0.9},
    "LAMB8bit": {"weight_decay": 0.1},
}


class Run:
    """A model, its optimizer with two param groups, one of them with a tensor lr, and a scheduler."""

    def __init__(self, name: str, seed: int = 0, shard: bool = True, module: nn.Module | None = None) -> None:
        self.model = model(seed=seed) if module is None else module
        if shard:
            sharded(self.model, init_device_mesh("cpu", (dist.get_world_size(),)))
        params = list(self.model.parameters())
        groups = [{"params": params[::2]}, {"params": params[1::2], "lr": torch.tensor(0.02), "weight_decay": 0.1}]
        options = {} if name.endswith("32bit") else {"min_8bit_size": MIN_8BIT}
        self.optimizer = build(name.split(",")[0], groups, lr=0.01, **{**options, **CASES.get(name, {})})
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 5], gamma=0.5)

    def train(self, steps: range) -> list[Tensor]:
        """The same batch on every rank: averages over 1, 2 and 4 of them are exact."""
        losses = []
        for step in steps:
            x = torch.randn(4, 300, generator=torch.Generator().manual_seed(step))
            loss = self.model(x).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            losses.append(loss.detach().clone())
        return losses

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and states, whole."""
        return {key: whole(as_bytes(tensor)).clone() for key, tensor in tensors_of(self.optimizer).items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [key for key, x in expected.items() if actual[key].dtype != x.dtype or not torch.equal(actual[key], x)] == []


def in_32_bits(tensors: dict[str, Tensor], params: Collection[str] | None = None) -> dict[str, Tensor]:
    """States of an Adam with every code replaced by its value; those of all parameters, or of some, by number."""
    scales = {key: x for key, x in tensors.items() if key.endswith("_absmax")}
    scales = {key: x for key, x in scales.items() if params is None or key.split(".")[0] in params}
    codes = {key.removesuffix("_absmax"): CODEBOOKS[not key.endswith("_sq_absmax")] for key in scales}
    values = {key: states.decode(tensors[key], scales[f"{key}_absmax"], code) for key, code in codes.items()}
    return {key: x for key, x in tensors.items() if key not in scales} | values


@contextmanager
def unchanged(run: Run) -> Iterator[None]:
    """Model, states and options have the same bytes afterwards."""
    before = run.tensors() | {key: whole(x).clone() for key, x in run.model.state_dict().items()}
    objects = [run.optimizer.state.get(param) for group in run.optimizer.param_groups for param in group["params"]]
    options = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    options = [{k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()} for group in options]
    yield
    assert_equal(run.tensors() | {key: whole(x) for key, x in run.model.state_dict().items()}, before)
    now = [run.optimizer.state.get(param) for group in run.optimizer.param_groups for param in group["params"]]
    assert all(a is b for a, b in zip(now, objects, strict=True))
    for group, kept in zip(run.optimizer.param_groups, options, strict=True):
        assert {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"} == kept


# ---- ways to save and load -------------------------------------------------------------------------------------------

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save(way: str, run: Run, path: Path) -> None:
    if way == "save_checkpoint":
        save_checkpoint(run.model, run.optimizer, path, extra={"scheduler": run.scheduler.state_dict()})
    elif way == "full":
        states = get_state_dict(run.model, run.optimizer, options=FULL)
        if dist.get_rank() == 0:
            torch.save((*states, run.scheduler.state_dict()), path)
        dist.barrier()
    else:
        torch.save(run.scheduler.state_dict(), f"{path}.scheduler")
        states = get_state_dict(run.model, run.optimizer, options=FLAT if way == "flat" else None)
        state = {"model": states[0], "optimizer": states[1]}
        if way == "async_save":
            group = dist.new_group()  # the saving thread's collectives would meet those of training in one group
            saving = dcp.async_save(state, checkpoint_id=path, process_group=group)
            run.train(range(90, 92))  # not in the checkpoint
            saving.result()
        else:
            dcp.save(state, checkpoint_id=path)


def load(way: str, run: Run, path: Path) -> None:
    if way == "save_checkpoint":
        run.scheduler.load_state_dict(load_checkpoint(run.model, run.optimizer, path)["scheduler"])
        return
    if way == "full":
        saved = torch.load(path, weights_only=True)
        model_state, optimizer_state, scheduler = saved if dist.get_rank() == 0 else ({}, {}, saved[2])
        options = FROM_RANK_0
    else:
        options = FLAT if way == "flat" else StateDictOptions()
        model_state, optimizer_state = get_state_dict(run.model, run.optimizer, options=options)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=path, planner=SafeLoadPlanner())
        scheduler = torch.load(f"{path}.scheduler", weights_only=True)
    # Not set_state_dict: of ranks that pass empty dictionaries, it takes that for "no model".
    set_optimizer_state_dict(run.model, run.optimizer, optimizer_state, options=options)
    set_model_state_dict(run.model, model_state, options=options)
    run.scheduler.load_state_dict(scheduler)

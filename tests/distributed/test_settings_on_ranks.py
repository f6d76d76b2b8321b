"""On several ranks no result depends on torch's global settings either: steps, checkpoints, operators on DTensors."""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import bnbops
from bnbops.distributed import data_parallel, load_checkpoint, save_checkpoint
from bnbops.dtensors import local
from bnbops.testing.sample import integers, normal
from cases.global_settings import SETTINGS, bits
from cases.ranks import run_on_ranks


def model(mesh: DeviceMesh | None) -> nn.Module:
    made = nn.Sequential(*(nn.Linear(*size, device="cpu", dtype=torch.float32) for size in ((64, 66), (66, 128))))
    made.load_state_dict({name: normal(*x.shape) for name, x in made.state_dict().items()})
    return made if mesh is None else fully_shard(made, mesh=mesh)


def table(mesh: DeviceMesh) -> nn.Module:
    made = bnbops.nn.Embedding4bit(33, 64, torch.float32, device="cpu", compress_statistics=True)
    made.load_state_dict({"weight": normal(33, 64)})
    return fully_shard(made.to("cpu"), mesh=mesh)


def run(setting: str | None, folder: str) -> Any:
    """What is made of parameters, gradients and inputs that no setting touches."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    trained, resumed, rows, x = model(mesh), model(mesh), table(mesh), normal(4, 64, seed=5)
    trained(x).square().mean().backward()
    with nullcontext() if setting is None else SETTINGS[setting]():
        options = {"lr": 1e-2, "min_8bit_size": 64, "percentile_clipping": 5}
        first, second = (bnbops.optim.LAMB8bit(each.parameters(), **options) for each in (trained, resumed))
        first.step()
        save_checkpoint(trained, first, Path(folder, str(setting)), extra={"epoch": 1})
        extra = load_checkpoint(resumed, second, Path(folder, str(setting)))
        results = [extra, rows(integers(0, 33, (5,), torch.int64))]
        for optimizer in (first, second):
            results += [[local(p), {k: local(v) for k, v in s.items()}] for p, s in optimizer.state.items()]
        parallel = data_parallel(model(None), mesh)
        with torch.autocast("cpu", enabled=False):  # which is there to change the dtype of products
            results.append(parallel(x))
    return bits(results)


def all_settings(folder: str) -> list[str]:
    """Those under which something is not the same."""
    wanted = run(None, folder)
    return [name for name in SETTINGS if run(name, folder) != wanted]


def test_results_on_two_ranks_do_not_depend_on_settings():
    with tempfile.TemporaryDirectory() as folder:
        assert run_on_ranks(2, all_settings, folder) == [[], []]

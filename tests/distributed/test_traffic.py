"""Bytes sent and held, told from shapes, against those of FSDP2 at work."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import bnbops
from bnbops.distributed import Traffic, traffic
from bnbops.dtensors import local
from bnbops.estimate import estimate
from cases.ranks import run_on_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
GPT = importlib.import_module("gpt").GPT


class Collectives(TorchDispatchMode):
    """Counts the whole tensors that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[int] = []
        self.scattered: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        if function is torch.ops.c10d._allgather_base_.default:
            self.gathered.append(args[0].nbytes)
        elif function is torch.ops.c10d._reduce_scatter_base_.default:
            self.scattered.append(args[1].nbytes)
        return function(*args, **kwargs or {})


def model(base: str) -> nn.Module:
    torch.manual_seed(0)
    gpt = GPT(vocabulary=101, layers=2, width=64, heads=2, block_size=16)  # 101 rows: nobody's multiple
    if base != "dense":
        bnbops.nn.quantize_(gpt.blocks, base, progress=False)
    return gpt


def measured(base: str, policy: dict[str, Any], reshard: bool) -> tuple[dict[str, int], dict[str, int]]:
    """What a step sends, and what a rank holds after it."""
    gpt = model(base)
    for block in gpt.blocks:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(**policy), reshard_after_forward=reshard)
    fully_shard(gpt, mp_policy=MixedPrecisionPolicy(**policy))
    optimizer = bnbops.optim.AdamW8bit(gpt.parameters())
    tokens = torch.arange(32).view(2, 16)
    with Collectives() as seen:
        gpt.loss(tokens, tokens).backward()
    optimizer.step()
    states = [item for state in optimizer.state.values() for item in state.items()]

    def held(tensors: list[Tensor]) -> int:
        return sum(local(tensor).nbytes for tensor in tensors)

    sent = {
        "gathered": sum(seen.gathered),
        "scattered": sum(seen.scattered),
        "calls": len(seen.gathered + seen.scattered),
    }
    return sent, {
        "weights": held(list(gpt.parameters())),
        "grads": held([param.grad for param in gpt.parameters() if param.grad is not None]),
        "states": held([tensor for key, tensor in states if key in ("exp_avg", "exp_avg_sq")]),
        "scales": held([tensor for key, tensor in states if key.endswith("_absmax")]),
        "steps": held([tensor for key, tensor in states if key == "step"]),
    }


HALF = {"param_dtype": torch.bfloat16}
CASES = [
    ("dense", {}, True),
    ("dense", {**HALF, "reduce_dtype": torch.float32}, True),
    ("dense", HALF, False),
    ("nf4", {}, True),
]


def all_measured() -> list[Any]:
    return [measured(*case) for case in CASES]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bytes_of_real_ranks(ranks):
    results = run_on_ranks(ranks, all_measured)
    for i, (base, policy, reshard) in enumerate(CASES):
        gpt = model(base)
        told = traffic(gpt, gpt.blocks, ranks, **policy, reshard_after_forward=reshard)
        for sent, _ in (result[i] for result in results):
            if ranks > 1:  # alone, FSDP copies instead of calling collectives
                assert told.collectives == sent["calls"]
                assert (told.gathered, told.scattered) == tuple(
                    sent[kind] // ranks * (ranks - 1) for kind in ("gathered", "scattered")
                )
        held = estimate(gpt, "AdamW8bit", shards=ranks).per_rank
        assert results[0][i][1] == {key: getattr(held, key) for key in results[0][i][1]}, CASES[i]


def test_of_one_matrix():
    layer = nn.Linear(4, 6, bias=False)  # 6 rows of 16 bytes; 4 ranks have 2 each, with padding
    model = nn.Sequential(layer)
    assert traffic(model, [layer], 4) == Traffic(gathered=2 * 6 * 16, scattered=6 * 16, unsharded=8 * 16, collectives=3)
    assert traffic(model, [], 4) == Traffic(gathered=6 * 16, scattered=6 * 16, unsharded=8 * 16, collectives=2)
    assert traffic(model, [layer], 1) == Traffic(gathered=0, scattered=0, unsharded=6 * 16, collectives=0)


def test_refusals():
    layer = nn.Linear(4, 6)
    with pytest.raises(ValueError, match="ranks must be a positive whole number, got 0"):
        traffic(layer, [], 0)
    with pytest.raises(ValueError, match="Linear are not"):
        traffic(nn.Sequential(layer), [nn.Linear(4, 6)], 2)

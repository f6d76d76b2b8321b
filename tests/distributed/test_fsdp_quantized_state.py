"""State dicts and checkpoints of sharded quantized layers: those of one process, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bnbops.nn import plain_state_dict, quantize_
from cases.fsdp_quantized import FORMATS, Net, loss_of, quantized, shard, whole_tensors, with_adapters
from cases.layers_4bit import differing
from cases.ranks import run_on_ranks
from cases.sharded import whole

FULL = StateDictOptions(full_state_dict=True)
OFFLOADED = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def tuned(name: str, seed: int = 0) -> Net:
    return with_adapters(quantized(name, seed))


def on_meta(name: str) -> Net:
    """Without data: quantized as a real model is, but on the meta device."""
    with torch.device("meta"):
        return with_adapters(quantize_(Net(), **FORMATS[name], embeddings=True, progress=False))


def first_rank_only(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(state) if dist.get_rank() == 0 else {}


def gathering(name: str) -> None:
    one, model = tuned(name), shard(tuned(name))
    expected = whole_tensors(one)
    parts = get_model_state_dict(model)
    assert differing({key: whole(x) for key, x in parts.items()}, expected) == []
    buffers = {key for key, x in parts.items() if not isinstance(x, DTensor)}
    assert all(key.endswith("weight_nested_code") for key in buffers)
    full, offloaded = (get_model_state_dict(model, options=options) for options in (FULL, OFFLOADED))
    assert differing(full, expected) == []
    assert differing(offloaded, expected if dist.get_rank() == 0 else {}) == []

    for other, assign in ((tuned(name, seed=1), False), (on_meta(name), True)):
        other.load_state_dict(full, assign=assign)
        assert differing(other.state_dict(), one.state_dict()) == []  # bitsandbytes' entries


def adapters_alone(name: str) -> None:
    """What trains, without the frozen base."""
    one, model, target = tuned(name), shard(tuned(name)), shard(tuned(name))
    with torch.no_grad():
        for net in (one, model):
            for parameter in net.parameters():
                parameter.mul_(2) if parameter.requires_grad else None
    saved = get_model_state_dict(model, options=replace(FULL, ignore_frozen_params=True))
    trained = {key: p.detach() for key, p in one.named_parameters() if p.requires_grad}
    assert differing({key: x for key, x in saved.items() if not key.endswith("nested_code")}, trained) == []
    set_model_state_dict(target, first_rank_only(saved), options=replace(BROADCAST, strict=False))
    assert differing(whole_tensors(target), plain_state_dict(one)) == []


def setting(name: str) -> None:
    one = tuned(name)
    expected, loss = plain_state_dict(one), loss_of(one, 0, 0)

    def check(model: nn.Module, state: dict[str, Tensor], options: StateDictOptions | None) -> None:
        assert not any(set_model_state_dict(model, state, options=options))
        assert differing(whole_tensors(model), expected) == []
        assert torch.equal(loss_of(model, 0, 0), loss)

    check(shard(tuned(name, seed=1)), get_model_state_dict(shard(tuned(name))), None)
    check(shard(tuned(name, seed=1)), dict(expected), FULL)
    for model in (shard(tuned(name, seed=1 + dist.get_rank())), shard(on_meta(name)).to_empty(device="cpu")):
        check(model, first_rank_only(expected), BROADCAST)
    check(shard(on_meta(name)), dict(expected), FULL)  # torch assigns what was on the meta device


def refusing(name: str) -> None:
    """Entries of a whole layer, quantized or float: on every rank, and no code or scale changes."""
    model = shard(quantized(name, seed=1))
    before = {key: x for key, x in whole_tensors(model).items() if not x.is_floating_point()}
    floats = {key: x.float() for key, x in Net().state_dict().items()}
    for state in (quantized(name).state_dict(), floats):
        with pytest.raises(RuntimeError, match=r"(?s)(.*got .* of a whole layer: .*plain_state_dict){6}"):
            set_model_state_dict(model, dict(state), options=FULL)
        after = whole_tensors(model)
        assert differing({key: after[key] for key in before}, before) == []
    with pytest.raises(RuntimeError):  # torch has copied parts of it by then
        set_model_state_dict(model, first_rank_only(quantized(name).state_dict()), options=BROADCAST)


def replicated(name: str) -> None:
    """DDP's state dict is the module's."""
    expected, model = tuned(name).state_dict(), DistributedDataParallel(tuned(name, seed=1))
    model.module.load_state_dict(expected)
    assert differing(get_model_state_dict(model), expected) == []


def every_format(*checks: str) -> None:
    for name in FORMATS:
        for check in checks:
            globals()[check](name)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.every_torch)])
def test_state_dicts(count):
    run_on_ranks(count, every_format, "gathering", "adapters_alone", "setting", "refusing", "replicated")


# ---- torch.distributed.checkpoint ------------------------------------------------------------------------------


def save(folder: str) -> None:
    for name in FORMATS:
        dcp.save(get_model_state_dict(shard(tuned(name))), checkpoint_id=Path(folder, name))


def load(folder: str) -> None:
    for name in FORMATS:
        model = shard(on_meta(name)).to_empty(device="cpu")
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id=Path(folder, name))
        set_model_state_dict(model, state)
        assert differing(whole_tensors(model), plain_state_dict(tuned(name))) == []


@pytest.mark.every_torch
def test_checkpoints_reshard(tmp_path):
    """Saved on 2 ranks, loaded on 4, on 1 and without torch.distributed; and back."""
    run_on_ranks(2, save, str(tmp_path / "of two"))
    for count in (4, 1):
        run_on_ranks(count, load, str(tmp_path / "of two"))
    for name in FORMATS:
        model, expected = tuned(name, seed=1), tuned(name)
        dcp.load(plain_state_dict(model), checkpoint_id=tmp_path / "of two" / name, no_dist=True)
        assert differing(model.state_dict(), expected.state_dict()) == []
        assert torch.equal(loss_of(model, 0, 0), loss_of(expected, 0, 0))
        dcp.save(plain_state_dict(expected), checkpoint_id=tmp_path / "of one" / name, no_dist=True)
    run_on_ranks(4, load, str(tmp_path / "of one"))

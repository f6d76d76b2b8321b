"""Writing our states as bitsandbytes does: its keys, dtypes and shapes, and no other training run."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from test_optimizer_checkpoint import through_torch_save
from torch import nn

import bnbops
from bnbops.optim.checkpoints.interchange import to_bitsandbytes
from cases.interchange import FAMILIES, NESTED, SHAPES, STATES, family, fresh
from cases.optimizers import assert_same, assert_same_state, params, train
from reference import states as ref
from reference.group import CODEBOOKS


def test_rows_of_whole_blocks_keep_their_bytes():
    optimizer, p = fresh("AdamW8bit", [(40, 512), (16, 16, 4, 4)])
    train(p, optimizer, range(3))
    written = to_bitsandbytes(optimizer)["state"]
    for i, parameter in enumerate(p):
        state, saved = optimizer.state[parameter], written[i][NESTED]
        assert saved["absmax1"].dim() == saved["absmax2"].dim() == 1
        assert_same([saved["state1"], saved["state2"]], [state["exp_avg"], state["exp_avg_sq"]])
        assert_same([saved["absmax1"]], [state["exp_avg_absmax"].flatten()])
        assert_same([saved["absmax2"]], [state["exp_avg_sq_absmax"].flatten()])


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "RMSprop8bit"])
def test_other_rows_are_encoded_again(name):
    """Blocks that end with their rows become flat ones: the nearest codes of the same values."""
    optimizer, p = fresh(name, [(100, 77), (9, 700), (3, 40, 40)])
    train(p, optimizer, range(3))
    written = to_bitsandbytes(optimizer)["state"]
    for i, parameter in enumerate(p):
        state, saved = optimizer.state[parameter], written[i][NESTED]
        for number, names in enumerate(STATES[family(name)], 1):
            codes = saved[f"state{number}"].view(len(names), *parameter.shape)
            absmax = saved[f"absmax{number}"].view(len(names), -1)
            for k, key in enumerate(names):
                values = ref.decode(state[key], state[f"{key}_absmax"], CODEBOOKS[number == 1])
                no_error = torch.zeros_like(values, dtype=torch.float64)
                ref.assert_encoded(codes[k], absmax[k], values.double(), no_error, CODEBOOKS[number == 1], key)


@pytest.mark.parametrize("name", [f"{family}{bits}" for family in FAMILIES for bits in ("8bit", "32bit")])
def test_what_is_written_is_what_bitsandbytes_writes(name, golden):
    """The same keys, dtypes and shapes as in a state dict of bitsandbytes' own."""
    expected = golden(f"opt_{family(name)}8bit_float32.state_dict.pt")
    optimizer, p = fresh(name, min_8bit_size=1024)  # the recorded ones are parts of larger parameters
    train(p, optimizer, range(5))
    written = through_torch_save(to_bitsandbytes(optimizer))
    assert written["param_groups"][0].keys() == expected["param_groups"][0].keys()
    for i, state in expected["state"].items():
        # fp32 states have the keys and shapes of 8-bit ones, but for codebooks and scales
        saved = {k: x for k, x in state[NESTED].items() if "8bit" in name or not k.startswith(("qmap", "absmax"))}
        found = written["state"][i]
        assert found.keys() == state.keys() and found["step"] == 5 and type(found["step"]) is int
        assert {k: x.shape for k, x in found[NESTED].items()} == {k: x.shape for k, x in saved.items()}
        dtypes = {k: x.dtype if "8bit" in name else torch.float32 for k, x in saved.items()}
        assert {k: x.dtype for k, x in found[NESTED].items()} == dtypes
        assert all(x.is_contiguous() for x in found[NESTED].values())
        for number in (1, 2):
            if f"qmap{number}" in found[NESTED]:
                assert torch.equal(found[NESTED][f"qmap{number}"], saved[f"qmap{number}"])


def test_writing_changes_nothing():
    optimizer, p = fresh("AdEMAMix8bit")
    train(p, optimizer, range(2))
    before = copy.deepcopy(optimizer)
    to_bitsandbytes(optimizer)
    assert_same_state(optimizer, before)


NOT_WRITTEN = {
    "maximize": ("AdamW8bit", {"maximize": True}),
    "nesterov": ("SGD8bit", {"momentum": 0.9, "nesterov": True}),
    "dampening": ("LARS8bit", {"momentum": 0.9, "dampening": 0.1}),
    "momentum=0": ("SGD8bit", {"momentum": 0.0}),
    "momentum": ("RMSprop8bit", {"momentum": 0.9}),
    "lr_decay": ("Adagrad8bit", {"lr_decay": 0.1}),
    "bias_correction": ("LAMB8bit", {"bias_correction": False}),
    "adam_w_mode": ("LAMB8bit", {"adam_w_mode": False}),
}


@pytest.mark.parametrize("option", NOT_WRITTEN)
def test_options_bitsandbytes_ignores_are_not_written(option):
    name, keywords = NOT_WRITTEN[option]
    optimizer, p = fresh(name, **keywords)
    train(p, optimizer, range(1))
    with pytest.raises(ValueError, match=option):
        optimizer.bitsandbytes_state_dict()


def test_a_state_that_is_not_complete_is_not_written():
    """Momentum was switched on, but no step has made the buffers."""
    optimizer, p = fresh("SGD8bit", momentum=0.0)
    train(p, optimizer, range(1))
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"no momentum_buffer yet.*init_state"):
        optimizer.bitsandbytes_state_dict()
    optimizer.init_state()
    assert optimizer.bitsandbytes_state_dict()["state"].keys() == {0, 1, 2, 3}


def test_optimizers_without_counterpart(golden):
    optimizer = bnbops.optim.PytorchLARS(params(*SHAPES), momentum=0.9)
    with pytest.raises(ValueError, match="PytorchLARS has no counterpart"):
        optimizer.bitsandbytes_state_dict()
    with pytest.raises(ValueError, match="PytorchLARS has no counterpart"):
        optimizer.load_state_dict(golden("opt_LARS8bit_float32.state_dict.pt"))


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_parameters_are_refused(one_rank):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    p = [nn.Parameter(distribute_tensor(x.detach(), mesh, [Shard(0)])) for x in params(*SHAPES)]
    optimizer = bnbops.optim.AdamW8bit(p, lr=0.7)
    optimizer.init_state()
    with pytest.raises(ValueError, match="sharded"):
        optimizer.bitsandbytes_state_dict()

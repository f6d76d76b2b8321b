"""data_parallel: the training of fully_shard, of modules that know nothing of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from bnbops.distributed import data_parallel
from cases.data_parallel import (
    LABELS,
    WIDTH,
    Net,
    differing,
    fsdp2,
    mesh_of,
    optimizer_of,
    parallel,
    step_of,
    train,
)
from cases.ranks import run_on_ranks
from cases.sharded import whole

MODES = ["fully_shard", "replicate", "hybrid_shard"]
PLACEMENTS = {"fully_shard": (Shard(0),), "replicate": (Replicate(),), "hybrid_shard": (Replicate(), Shard(0))}


def trained(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    optimizer = optimizer_of(model)
    return train(model, optimizer, step_of(model, optimizer))


# ---- as fully_shard --------------------------------------------------------------------------------------------


def as_fully_shard() -> None:
    """A sum of two is the same in any order."""
    losses, expected = trained(fsdp2(Net(), mesh_of()))
    for mode in MODES:
        model = parallel(mode)
        assert all(param.placements == PLACEMENTS[mode] for param in model.parameters())
        actual = trained(model)
        assert torch.equal(torch.stack(actual[0]), torch.stack(losses))
        assert differing(actual[1], expected) == []


def mixed_precision() -> None:
    for param_dtype, reduce_dtype in [(torch.bfloat16, torch.float32), (torch.bfloat16, None), (None, torch.bfloat16)]:
        losses, expected = trained(fsdp2(Net(), mesh_of(), MixedPrecisionPolicy(param_dtype, reduce_dtype)))
        actual = trained(parallel("fully_shard", param_dtype=param_dtype, reduce_dtype=reduce_dtype))
        assert torch.equal(torch.stack(actual[0]), torch.stack(losses))
        assert differing(actual[1], expected) == [], (param_dtype, reduce_dtype)


def four_ranks() -> None:
    for mode in MODES:
        mesh = mesh_of(mode) if mode == "hybrid_shard" else mesh_of()
        expected, actual = trained(fsdp2(Net(), mesh))[0], trained(parallel(mode))[0]
        torch.testing.assert_close(actual, expected)
        if mode == "fully_shard":
            head = parallel(mode).head
            held = dict(head.named_parameters())["weight"]
            assert head.weight.shape == held.shape == (LABELS, WIDTH)
            assert held.to_local().shape[0] == [2, 2, 1, 0][dist.get_rank()]


# ---- all kinds of modules --------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """Every way to hold a parameter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.conv = nn.Conv1d(6, 6, 1)
        self.batch_norm = nn.BatchNorm1d(6)
        self.listed = nn.ParameterList([torch.randn(6, 6), torch.randn(6)])
        self.named = nn.ParameterDict({"shift": torch.randn(6)})
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 6))
        self.frozen = nn.Parameter(torch.randn(1, 6), requires_grad=False)
        self.order = nn.Parameter(torch.randperm(6), requires_grad=False)
        self.nothing = nn.Parameter(torch.randn(3))  # without a gradient
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.lstm(self.embed(tokens))[0]
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.batch_norm(self.conv(self.normed(x).transpose(1, 2))).transpose(1, 2)
        x = x @ self.listed[0] + self.listed[1] + self.named["shift"] + self.frozen + self.empty.sum()
        return self.head(x[..., self.order] * self.temperature)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the same batch on every rank."""
    tokens = torch.arange(20).view(4, 5) % 11
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    return {name: whole(param.grad) for name, param in model.named_parameters() if param.grad is not None}


def all_kinds_of_modules() -> None:
    one = Zoo()
    expected = gradients(one)
    assert expected.keys() >= {"embed.weight", "lstm.weight_hh_l0", "temperature", "listed.0", "empty"}
    assert expected.keys().isdisjoint({"frozen", "order", "nothing"})
    for mode in MODES:
        model = data_parallel(Zoo(seed=dist.get_rank()), mesh_of(mode), mode)  # takes the first rank's
        assert all(isinstance(param, DTensor) for param in model.parameters())
        assert model.head._parameters["weight"] is model.embed._parameters["weight"]
        assert dist.get_rank() != 0 or "bias=True" in repr(model)  # one rank can print it
        assert isinstance(model.lstm, nn.LSTM) and model.order.dtype == torch.int64
        assert differing(gradients(model), expected) == []


def printing() -> None:
    """It changes nothing meanwhile: another thread may be in a forward."""

    class Told(nn.Linear):
        def extra_repr(self) -> str:
            classes.append(type(model[0]))
            return super().extra_repr()

    classes: list[type] = []
    model = data_parallel(nn.Sequential(Told(3, 2)), mesh_of())
    gathering = type(model[0])
    if dist.get_rank() == 0:  # one rank can print it
        assert "in_features=3, out_features=2, bias=True" in repr(model)
        assert classes == [gathering] and gathering is not Told


def state_dicts() -> None:
    one, model = Zoo(), data_parallel(Zoo(), mesh_of())
    assert list(model.state_dict()) == list(one.state_dict())
    full = StateDictOptions(full_state_dict=True)
    assert differing(get_model_state_dict(model, options=full), one.state_dict()) == []
    for state, options in ((get_model_state_dict(model), None), (one.state_dict(), full)):
        other = data_parallel(Zoo(seed=1), mesh_of())
        assert not any(set_model_state_dict(other, state, options=options))
        assert differing({key: whole(x) for key, x in other.state_dict().items()}, one.state_dict()) == []
    model.load_state_dict(one.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match=r"shape \[11, 6\] has been replaced by a plain tensor"):
        gradients(model)


def refusals() -> None:
    line, plane = mesh_of(), mesh_of("hybrid_shard")
    cases: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], str]] = [
        (Net(), (line, "ddp"), {}, "mode must be one of fully_shard, replicate, hybrid_shard, got 'ddp'"),
        (Net(), (plane,), {}, r"needs a mesh of 1 dimension, got 2: .* a slice of it"),
        (Net(), (line, "hybrid_shard"), {}, r"needs a mesh of 2 dimensions, got 1: "),
        (Net(), (line,), {"param_dtype": torch.int8}, "param_dtype must be a floating dtype or None, got torch.int8"),
        (Net(), (line,), {"reduce_dtype": torch.int8}, "reduce_dtype must be"),
        (Net().to("meta"), (line,), {}, "'blocks.0.norm.weight' is on the meta device; give it data"),
        (
            parallel("replicate"),
            (line,),
            {},
            "'blocks.0.norm.weight' is distributed already .* apply data_parallel once",
        ),
        (fully_shard(Net(), mesh=line), (line,), {}, "is distributed already"),
    ]
    partly = Net()
    data_parallel(partly.head, line)
    cases.append((partly, (line,), {}, "'head.weight' is distributed already"))
    for model, args, options, message in cases:
        before = [(type(module), dict(module._parameters)) for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            data_parallel(model, *args, **options)
        after = [(type(module), dict(module._parameters)) for module in model.modules()]
        assert [a[0] for a in after] == [b[0] for b in before]
        assert all(a[1][k] is b[1][k] for a, b in zip(after, before, strict=True) for k in b[1])


def together(*checks: str) -> None:
    for check in checks:
        globals()[check]()


def test_two_ranks() -> None:
    checks = (as_fully_shard, mixed_precision, all_kinds_of_modules, printing, state_dicts, refusals)
    run_on_ranks(2, together, *(check.__name__ for check in checks))


def test_uneven_and_empty_shards() -> None:
    run_on_ranks(4, four_ranks)

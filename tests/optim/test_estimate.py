"""Estimated bytes against those of real tensors, and `python -m bnbops estimate`."""

import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnbops
from bnbops.__main__ import main
from bnbops.dtensors import local
from bnbops.estimate import Bytes, Estimate, estimate, optimizers
from bnbops.optim import AdamW, AdamW8bit
from bnbops.optim.core.manager import GlobalOptimManager

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))  # where Python looks when it runs the scripts
GPT = importlib.import_module("gpt").GPT

OPTIMIZERS = optimizers()
DEMO = {"vocabulary": 4096, "layers": 5, "width": 384, "heads": 6, "block_size": 128}  # of examples/train_gpt.py


def build(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS[name](model.parameters(), **{"lr": 1e-3, **options})


def measured(model: nn.Module, optimizer: torch.optim.Optimizer) -> Bytes:
    """Bytes of this process's tensors; gradients are those that exist."""

    def nbytes(tensors: Iterable[Tensor]) -> int:
        return sum(local(tensor).nbytes for tensor in tensors)

    params = list(model.parameters())
    state = [item for tensors in optimizer.state.values() for item in tensors.items()]
    scales = [tensor for key, tensor in state if key.endswith("_absmax")]
    steps = [tensor for key, tensor in state if key in ("step", "gnorm_vec")]
    every = nbytes(tensor for _, tensor in state)
    return Bytes(
        weights=nbytes(params),
        grads=nbytes(p.grad for p in params if p.grad is not None),
        states=every - nbytes(scales) - nbytes(steps),
        scales=nbytes(scales),
        steps=nbytes(steps),
    )


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 0.01)
    optimizer.step()


class Small(nn.Module):
    """Something of everything: large and small, awkward rows, four dimensions, one, none, shared, frozen, integer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(300, 70)
        self.small = nn.Linear(5, 7)
        self.conv = nn.Conv2d(33, 13, 5)
        self.embedding = nn.Embedding(20, 256)
        self.tied = nn.Linear(256, 20, bias=False)
        self.tied.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(100, 100).requires_grad_(False)
        self.vectors = nn.ParameterList([torch.zeros(65536), torch.zeros(65537)])  # of whole blocks on 8 ranks, or not
        self.packed = nn.Parameter(torch.zeros(50, 60, dtype=torch.uint8), requires_grad=False)


# ---- against real tensors --------------------------------------------------------------------------------------


def paged(name: str, folder: Path) -> dict[str, Any]:
    return {"paged_directory": folder} if name.startswith("Paged") else {}


OPTIONS = [{}, {"min_8bit_size": 10}, {"percentile_clipping": 5}]
CASES = [(name, options) for name in OPTIMIZERS for options in OPTIONS]
CASES.remove(("PytorchLARS", {"min_8bit_size": 10}))  # it has no 8-bit states and no such argument
CASES += [(name, {"momentum": 0.9}) for name in OPTIMIZERS if name.startswith(("SGD", "LARS", "RMSprop"))]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_states_are_exactly_those_after_a_step(name, options, tmp_path):
    """The real optimizer over a real module of mixed parameters, all kinds of bytes."""
    model = Small()
    optimizer = build(name, model, **options, **paged(name, tmp_path))
    take_step(model, optimizer)
    expected = measured(model, optimizer)
    with torch.device("meta"):
        found = estimate(Small(), name, **options)
    assert found.whole == found.per_rank == expected
    assert found.whole.total == sum(vars(expected).values())
    assert found.parameters == sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def demo_gpt() -> nn.Module:
    """The example's model in bf16, with gradients."""
    model = GPT(**DEMO).to(torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_demo_gpt(name, demo_gpt, tmp_path):
    """Within 1 %, and in fact exactly."""
    optimizer = build(name, demo_gpt, **paged(name, tmp_path))
    optimizer.init_state()
    expected = measured(demo_gpt, optimizer)
    with torch.device("meta"):
        found = estimate(GPT(**DEMO), name, dtype=torch.bfloat16)
    assert found.whole.total == pytest.approx(expected.total, rel=0.01)
    assert found.whole == expected
    if name.endswith("8bit") and expected.states:
        assert expected.scales > 0


def test_a_number_of_parameters_is_near_a_transformer_of_as_many():
    """Large matrices are the assumption; here vectors and an odd width are 1 % of the states."""
    model = GPT(**DEMO)
    count = sum(p.numel() for p in model.parameters())
    for name in ("AdamW8bit", "AdamW32bit"):
        assert estimate(count, name).whole.total == pytest.approx(estimate(model, name).whole.total, rel=0.01)


def test_a_number_of_parameters_by_hand():
    """7e9 in bf16 with AdamW8bit: two bytes each for weight, gradient and states, and 2 fp32 scales for 256."""
    found = estimate(7e9, "adamw8bit", dtype=torch.bfloat16, shards=7)
    n = 7_000_000_000
    whole = Bytes(weights=2 * n, grads=2 * n, states=2 * n, scales=n // 32, steps=4)
    rows = -(n // 256 // -7)
    rank = Bytes(weights=512 * rows, grads=512 * rows, states=512 * rows, scales=8 * rows, steps=4)
    assert found == Estimate("AdamW8bit", n, 7, whole, rank)
    assert estimate(100, "adamw8bit").whole == Bytes(weights=400, grads=400, states=800, scales=0, steps=4)
    assert estimate(2**20 + 100, "adamw8bit").parameters == 2**20 + 100


def test_shared_once_and_frozen_without_gradients():
    model = Small()
    found = estimate(model, "adamw")
    own = [model.wide.weight, model.wide.bias, model.small.weight, model.small.bias]
    own += [model.conv.weight, model.conv.bias, model.embedding.weight, model.scale, *model.vectors]
    trained = sum(p.numel() for p in own)
    assert found.whole.grads == 4 * trained and found.whole.states == 8 * trained
    assert found.whole.weights == 4 * (trained + 100 * 101) + 50 * 60
    assert found.whole.steps == 4 * len(own)
    assert all(p.grad is None for p in model.parameters())


def test_overrides_of_single_parameters_hold():
    """Those of the manager, and those that bnbops.nn's embeddings bring along."""
    model = nn.Sequential(bnbops.nn.Embedding(100, 256), nn.Linear(256, 100), nn.Linear(100, 256))
    manager = GlobalOptimManager.get_instance()
    manager.override_config(model[1].weight, "optim_bits", 32)
    optimizer = AdamW8bit(model.parameters())
    take_step(model, optimizer)
    found = estimate(model, AdamW8bit)
    assert found.whole == measured(model, optimizer)
    assert found.whole.states == 2 * (4 * (2 * 25600 + 100 + 256) + 25600)
    assert estimate(model, AdamW8bit, dtype=torch.bfloat16).whole.states == found.whole.states


def test_dtypes():
    """Integer weights keep theirs; gradients follow the weights unless told otherwise."""
    fp32, bf16 = estimate(Small(), AdamW), estimate(Small(), AdamW, dtype=torch.bfloat16)
    mixed = estimate(Small(), AdamW, dtype=torch.bfloat16, grad_dtype=torch.float32)
    assert bf16.whole.weights - 3000 == (fp32.whole.weights - 3000) // 2
    assert 2 * bf16.whole.grads == fp32.whole.grads == mixed.whole.grads
    assert bf16.whole.states == fp32.whole.states


# ---- sharded ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Eight ranks, of which this process is the first; nothing is sent."""
    from torch.distributed import destroy_process_group, init_device_mesh, init_process_group
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield init_device_mesh("cpu", (8,))
    destroy_process_group()


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "AdEMAMix8bit", "RMSprop8bit"])
def test_first_rank_of_eight(mesh, name):
    """Uneven rows (70, 7, 13, 20 over 8 ranks) and one parameter without dimensions, which stays whole."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = Small()
    for module in model.modules():
        for key, p in list(module.named_parameters(recurse=False)):
            placement = Shard(0) if p.dim() else Replicate()
            module.register_parameter(key, nn.Parameter(distribute_tensor(p, mesh, [placement]), p.requires_grad))
    model.tied.weight = model.embedding.weight
    optimizer = build(name, model, percentile_clipping=5)
    optimizer.init_state()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    found = estimate(Small(), name, shards=8, percentile_clipping=5)
    assert found.per_rank == measured(model, optimizer)
    assert estimate(model, name, shards=8, percentile_clipping=5) == found  # a sharded module has its global shapes
    assert found.whole == estimate(Small(), name, percentile_clipping=5).whole


def test_more_ranks_than_rows():
    """The first ranks have one row each, and its precision is the whole parameter's."""
    found = estimate(nn.Linear(1000, 5, bias=False), AdamW8bit, shards=64)
    assert found.per_rank == Bytes(weights=4000, grads=4000, states=2 * 1000, scales=2 * 16, steps=4)
    assert found.whole == Bytes(weights=20000, grads=20000, states=2 * 5000, scales=2 * 80, steps=4)


# ---- refusals --------------------------------------------------------------------------------------------------

KNOWN = ", ".join(OPTIMIZERS)
BAD = {
    "unknown optimizer": (lambda: estimate(10, "adamfoo"), f"unknown optimizer 'adamfoo'; bnbops.optim has {KNOWN}"),
    "torch's optimizer": (lambda: estimate(10, torch.optim.AdamW), "unknown optimizer <class"),
    "the base class": (lambda: estimate(10, "Optimizer"), "unknown optimizer 'Optimizer'"),
    "no parameters": (
        lambda: estimate(0, "adam"),
        "expected a module or a whole number of parameters from 1 to 1e+18, got 0",
    ),
    "half a parameter": (lambda: estimate(2.5, "adam"), "whole number of parameters from 1 to 1e+18, got 2.5"),
    "infinite": (lambda: estimate(float("inf"), "adam"), "whole number of parameters from 1 to 1e+18, got inf"),
    "text": (
        lambda: estimate("7B", "adam"),
        "expected a module or a whole number of parameters from 1 to 1e+18, got '7B'",
    ),
    "empty module": (lambda: estimate(nn.ReLU(), "adam"), "ReLU has no parameters"),
    "shards": (lambda: estimate(10, "adam", shards=0), "shards must be a positive whole number, got 0"),
    "half a shard": (lambda: estimate(10, "adam", shards=1.5), "shards must be a positive whole number, got 1.5"),
    "float64": (
        lambda: estimate(nn.Linear(2, 2).double(), "adam"),
        "the optimizers take parameters of float32, bfloat16, float16, not float64",
    ),
    "gradients": (
        lambda: estimate(10, "adam", grad_dtype=torch.float16),
        "gradients of float32 parameters are float32, not float16",
    ),
    "an option's value": (lambda: estimate(10, "adam", optim_bits=4), "optim_bits must be 8 or 32, got 4"),
}


@pytest.mark.parametrize("what", BAD)
def test_refusals(what):
    call, message = BAD[what]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_unknown_option():
    with pytest.raises(TypeError, match="nonsense"):
        estimate(10, "adam", nonsense=1)


# ---- the command -----------------------------------------------------------------------------------------------


def run(capsys, arguments: str) -> str:
    assert main(["estimate", *arguments.split()]) == 0
    return capsys.readouterr().out


def test_json_has_the_exact_bytes(capsys):
    output = run(capsys, "--params 7e9 1e6 --optimizer AdamW8bit --dtype bf16 --grad-dtype fp32 --shards 3 --json")
    large, small = json.loads(output)
    expected = estimate(7e9, "adamw8bit", dtype=torch.bfloat16, grad_dtype=torch.float32, shards=3)
    assert small["parameters"] == 10**6
    assert (large["optimizer"], large["parameters"], large["shards"]) == ("AdamW8bit", 7 * 10**9, 3)
    assert large["whole"] == {**vars(expected.whole), "total": expected.whole.total}
    assert large["per_rank"] == {**vars(expected.per_rank), "total": expected.per_rank.total}


def test_table(capsys):
    lines = run(capsys, "--params 7e9 --optimizer adamw8bit adam --dtype bf16 --shards 8").splitlines()
    assert lines[0].startswith("Taken for large matrices")
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]] == [
        ["AdamW8bit", "7,000,000,000", "14.00 GB", "14.00 GB", "14.00 GB", "218.75 MB", "4 B", "42.22 GB"],
        ["- each of 8 ranks", "", "1.75 GB", "1.75 GB", "1.75 GB", "27.34 MB", "4 B", "5.28 GB"],
        ["Adam", "7,000,000,000", "14.00 GB", "14.00 GB", "56.00 GB", "0 B", "4 B", "84.00 GB"],
        ["- each of 8 ranks", "", "1.75 GB", "1.75 GB", "7.00 GB", "0 B", "4 B", "10.50 GB"],
    ]


def test_options_reach_the_optimizer(capsys):
    (plain,) = json.loads(run(capsys, "--params 1e6 --optimizer adamw --json"))
    (eight,) = json.loads(run(capsys, "--params 1e6 --optimizer adamw --json --option optim_bits=8"))
    (word,) = json.loads(run(capsys, "--params 1e6 --optimizer adamw8bit --json --option state_codec=fp32"))
    assert plain["whole"]["states"] == word["whole"]["states"] == 8 * 10**6
    assert eight["whole"]["states"] < 2.01 * 10**6


USAGE = {
    "--params 7B --optimizer adam": "expected a number of parameters such as 7e9, got '7B'",
    "--params -3 --optimizer adam": "whole number of parameters from 1 to 1e+18, got -3",
    "--params 1e300 --optimizer adam": "whole number of parameters from 1 to 1e+18, got 1e+300",
    "--params nan --optimizer adam": "whole number of parameters from 1 to 1e+18, got nan",
    "--params 7e9 --optimizer adamfoo": f"unknown optimizer 'adamfoo'; bnbops.optim has {KNOWN}",
    "--params 7e9 --optimizer adam --shards 0": "shards must be a positive whole number, got 0",
    "--params 7e9 --optimizer adam --dtype int4": "invalid choice: 'int4'",
    "--params 7e9 --optimizer adam --option momentum": "expected NAME=VALUE such as momentum=0.9, got 'momentum'",
    "--params 7e9 --optimizer adam --option nonsense=1": "nonsense",
    "--params 7e9": "the following arguments are required: --optimizer",
}


@pytest.mark.parametrize("arguments", USAGE)
def test_the_command_refuses(arguments, capsys):
    """With exit code 2, a message and no table."""
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", *arguments.split()])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert USAGE[arguments] in printed.err and not printed.out


def test_page_shows_what_the_command_prints(capsys):
    """docs/memory.md: each table is the output of the command above it."""
    page = (ROOT / "docs" / "memory.md").read_text()
    commands = re.findall(
        r"^python -m bnbops (estimate .+(?:\\\n.+)*)\n```\n\n((?:.+\n|\n(?=\|))+)", page, re.MULTILINE
    )
    assert commands
    for command, shown in commands:
        assert main(command.replace("\\\n", " ").split()) == 0
        assert capsys.readouterr().out == shown

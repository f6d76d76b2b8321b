"""Paged optimizers train as the others do, and keep their states in files of a directory."""

import copy
import gc
import importlib
import io
import itertools
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bnbops.optim
from bnbops import compiled_train_step
from bnbops.optim import AdamW, AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from cases.optimizers import MIXED, assert_same, assert_same_state, flat_state, params, set_grads, train
from cases.paged import in_a_fork, is_paged, mapped, run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where Python looks when it runs the script
benchmark = importlib.import_module("paged")

SHAPES = [*MIXED, (300, 256)]  # the last has states with files of their own
PAGED = [name for name in dir(bnbops.optim) if name.startswith("Paged")]


def states(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Everything in `optimizer`'s state that is paged: all but single numbers."""
    return {key: x for key, x in flat_state(optimizer).items() if key[1] != "step"}


def assert_paged(optimizer: torch.optim.Optimizer, directory: Path) -> None:
    assert states(optimizer)
    assert [key for key, x in states(optimizer).items() if not is_paged(x, directory)] == []


def test_there_are_paged_classes():
    bits = ("", "8bit", "32bit")
    assert [f"Paged{family}{b}" for family in ("Adam", "AdamW", "AdEMAMix", "Lion") for b in bits] == sorted(
        PAGED, key=lambda name: (name.rstrip("bit0123456789").lower(), name.endswith("t"), name.endswith("32bit"))
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [*zip(PAGED, itertools.cycle([torch.float32, torch.bfloat16]), strict=False)]
)
def test_trains_as_the_unpaged_class(name, dtype, tmp_path):
    p, q = params(*SHAPES, dtype=dtype), params(*SHAPES, dtype=dtype)
    paged = getattr(bnbops.optim, name)(p, lr=1e-2, paged_directory=tmp_path)
    plain = getattr(bnbops.optim, name.removeprefix("Paged"))(q, lr=1e-2)
    train(p, paged, range(3))
    train(q, plain, range(3))
    assert_same(p, q)
    assert_same_state(paged, plain)
    assert_paged(paged, tmp_path)
    assert os.listdir(tmp_path) == []
    del paged
    gc.collect()
    assert mapped(tmp_path) == []


def test_every_optimizer_can_be_paged(tmp_path):
    p = params(*SHAPES)
    optimizer = bnbops.optim.RMSprop(p, optim_bits=8, is_paged=True, paged_directory=tmp_path)
    train(p, optimizer, range(2))
    assert_paged(optimizer, tmp_path)


def test_init_state_and_compiled_steps_are_paged(tmp_path):
    p, q = params(*SHAPES), params(*SHAPES)
    paged, plain = PagedAdamW8bit(p, paged_directory=tmp_path), AdamW8bit(q)

    def make_step(parameters, optimizer):
        @compiled_train_step(optimizer=optimizer, backend="aot_eager")
        def step(scale):
            loss = sum((scale * x).square().sum() for x in parameters)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    paged_step, plain_step = make_step(p, paged), make_step(q, plain)
    for scale in (1.0, 0.5, 2.0):
        assert torch.equal(paged_step(torch.tensor(scale)), plain_step(torch.tensor(scale)))
    assert paged_step.graph_count == plain_step.graph_count == 1
    assert_same(p, q)
    assert_same_state(paged, plain)
    assert_paged(paged, tmp_path)
    assert "paged optimizer states belong to process" in in_a_fork(lambda: paged_step(torch.tensor(1.0)))
    assert_same_state(paged, plain)


def test_groups_may_differ(tmp_path):
    p = params((300, 256), (200, 256))
    optimizer = AdamW8bit([{"params": p[:1], "is_paged": True}, {"params": p[1:]}], paged_directory=tmp_path)
    train(p, optimizer, range(1))
    assert [is_paged(x, tmp_path) for x in states(optimizer).values()] == [True] * 4 + [False] * 4


# Saving, loading, copying


def through_a_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("target", [True, False], ids=["to paged", "to unpaged"])
@pytest.mark.parametrize("source", [True, False], ids=["from paged", "from unpaged"])
def test_loading(source, target, saved, tmp_path):
    def make(parameters: list[nn.Parameter], is_paged: bool, directory: Path) -> torch.optim.Optimizer:
        directory.mkdir()
        return AdamW(parameters, optim_bits=8, is_paged=is_paged, paged_directory=directory)

    p = params(*SHAPES)
    optimizer = make(p, source, tmp_path / "first")
    train(p, optimizer, range(2))
    state_dict = through_a_file(optimizer.state_dict()) if saved else optimizer.state_dict()
    q = copy.deepcopy(p)
    other = make(q, target, tmp_path / "second")
    other.load_state_dict(state_dict)
    assert_same_state(optimizer, other)
    kept = copy.deepcopy(flat_state(other))
    train(p, optimizer, range(2, 4))
    assert_same(list(flat_state(other).values()), list(kept.values()))  # nothing is shared
    train(q, other, range(2, 4))
    assert_same(p, q)
    assert_same_state(optimizer, other)
    for paged, directory, trained in ((source, "first", optimizer), (target, "second", other)):
        if paged:
            assert_paged(trained, tmp_path / directory)
        else:
            assert mapped(tmp_path / directory) == []


def test_loading_drops_the_former_files(tmp_path):
    p = params(*SHAPES)
    optimizer = PagedAdamW32bit(p, paged_directory=tmp_path)
    train(p, optimizer, range(1))
    before = len(mapped(tmp_path))
    state_dict = through_a_file(optimizer.state_dict())
    for _ in range(20):
        optimizer.load_state_dict(state_dict)
    gc.collect()
    assert len(mapped(tmp_path)) <= before + 1  # the chunk under way


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_files_of_its_own(how, tmp_path):
    p = params(*SHAPES)
    optimizer = PagedAdamW8bit(p, paged_directory=tmp_path)
    train(p, optimizer, range(2))
    other, q = COPIES[how]((optimizer, p))
    assert_paged(other, tmp_path)
    assert_same_state(optimizer, other)
    kept = copy.deepcopy(flat_state(other))
    train(p, optimizer, range(2, 4))
    assert_same(list(flat_state(other).values()), list(kept.values()))
    train(q, other, range(2, 4))
    assert_same(p, q)
    assert_same_state(optimizer, other)


def train_elsewhere(optimizer: torch.optim.Optimizer, directory: Path, expected: list[Tensor]) -> None:
    """Runs in a spawned process."""
    assert_paged(optimizer, directory)
    train(optimizer.param_groups[0]["params"], optimizer, range(1, 3))
    assert_same(list(states(optimizer).values()), expected)


def test_a_spawned_process_trains_a_copy(tmp_path):
    """torch.multiprocessing shares every tensor that it is given: the parameters here, but not the states."""
    optimizer = PagedAdamW8bit(params(*SHAPES), paged_directory=tmp_path)
    train(optimizer.param_groups[0]["params"], optimizer, range(1))
    kept, other = copy.deepcopy(flat_state(optimizer)), copy.deepcopy(optimizer)
    train(other.param_groups[0]["params"], other, range(1, 3))
    expected = [x.clone() for x in states(other).values()]

    spawn = torch.multiprocessing.get_context("spawn")
    process = spawn.Process(target=train_elsewhere, args=(optimizer, tmp_path, expected))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_same(list(flat_state(optimizer).values()), list(kept.values()))
    optimizer.load_state_dict(optimizer.state_dict())  # out of shared memory
    assert_paged(optimizer, tmp_path)


# What goes wrong


def test_a_bad_directory_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="paged_directory="):
        PagedAdamW8bit(params((64, 80)), paged_directory=tmp_path / "missing")


def test_parameters_elsewhere_are_refused(tmp_path):
    p = [nn.Parameter(torch.empty(64, 80, device="meta"))]
    with pytest.raises(ValueError, match="is_paged=True needs parameters on the CPU"):
        PagedAdamW8bit(p, paged_directory=tmp_path).init_state()


def test_a_forked_child_does_not_train(tmp_path):
    p = params(*SHAPES)
    optimizer = PagedAdamW8bit(p, paged_directory=tmp_path)
    train(p, optimizer, range(1))
    kept, start = copy.deepcopy(flat_state(optimizer)), copy.deepcopy(p)
    set_grads(p, 1)
    for call in (optimizer.step, optimizer.init_state, lambda: optimizer.load_state_dict(optimizer.state_dict())):
        assert f"RuntimeError: paged optimizer states belong to process {os.getpid()}" in in_a_fork(call)
    assert_same(list(flat_state(optimizer).values()), list(kept.values()))
    assert_same(p, start)
    train(p, optimizer, range(1, 2))


def test_a_full_disk_changes_nothing(tmp_path):
    """A limit on the size of files is a full disk for one process. The last parameter's states are too large."""
    code = """
        import copy, resource, sys, torch
        from bnbops.optim import AdamW32bit, PagedAdamW32bit
        from cases.optimizers import assert_same, assert_same_state, flat_state, params, set_grads, train

        shapes = [(5, 7), (600, 1024), (1025, 1024)]
        p, q = params(*shapes), params(*shapes)
        optimizer, reference = PagedAdamW32bit(p, paged_directory=sys.argv[1]), AdamW32bit(q)
        train(p[:1], optimizer, range(1))
        train(q[:1], reference, range(1))
        kept, start = copy.deepcopy(flat_state(optimizer)), copy.deepcopy(p)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, hard))
        set_grads(p, 1)
        for call in (optimizer.step, optimizer.init_state):
            try:
                call()
            except OSError as error:
                print(error)
            now = flat_state(optimizer)
            assert all(torch.equal(now[key], kept[key]) for key in kept)
            assert_same(p, start)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        train(p, optimizer, range(1, 3))
        train(q, reference, range(1, 3))
        assert_same(p, q)
        assert_same_state(optimizer, reference)

        other = PagedAdamW32bit(q, lr=0.5, paged_directory=sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, hard))
        try:
            other.load_state_dict(optimizer.state_dict())
        except OSError as error:
            print(error)
        assert flat_state(other) == {} and other.param_groups[0]["lr"] == 0.5
    """
    assert run(code, tmp_path).count(f"4,198,400 bytes in {str(tmp_path)!r}: File too large") == 3


def test_states_larger_than_the_memory_limit(tmp_path):
    """64 MiB of states, and 24 MiB of private memory to put them in."""
    code = """
        import re, resource, sys, torch
        from bnbops.optim import AdamW
        from cases.optimizers import params, set_grads

        torch.set_num_threads(1)
        p = params(*[(256, 1024)] * 32)
        set_grads(p, 0)
        for x in p:
            x.grad.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
        paged = {"is_paged": True, "paged_directory": sys.argv[1]} if sys.argv[3] == "paged" else {}
        optimizer = AdamW(p, **paged)  # has torch import the compiler, which takes more than the limit
        used = int(re.search(r"VmData:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
        if sys.argv[2] == "limited":
            resource.setrlimit(resource.RLIMIT_DATA, (used + 24 * 2**20,) * 2)
        for _ in range(3):
            optimizer.step()
            torch.save(optimizer.state_dict(), sys.argv[1] + "/checkpoint")
            optimizer.load_state_dict(optimizer.state_dict())
        print([x.detach().double().sum().item().hex() for x in p])
    """
    expected = run(code, tmp_path, "unlimited", "unpaged")
    assert run(code, tmp_path, "limited", "paged") == expected
    with pytest.raises(AssertionError, match=r"can't allocate memory|not enough memory|Cannot allocate memory"):
        run(code, tmp_path, "limited", "unpaged")


# The benchmark


def test_benchmark(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    figures = tmp_path / "figures.json"
    options = ["--params", "4Mi", "--rounds", "1", "--directory", "/var/tmp", "--json", str(figures)]
    results = benchmark.main(options)
    out = capsys.readouterr().out
    assert "verified: the same parameters from unpaged, no limit; paged, limited; paged, limited, paged out\n" in out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1
    assert "unpaged, limited: RuntimeError: " in out and "allocate" in out
    assert json.loads(figures.read_text()) == results
    plain, paged = results["unpaged, no limit"], results["paged, limited"]
    assert plain["states"] == paged["states"] == 8 * 2**22
    assert plain["private"] - paged["private"] > 2**24


def test_benchmark_where_only_paged_states_fit(monkeypatch, capsys):
    step = {"out": 0.5, "step": 1.5, "resident": 2**20, "read": 2**21}
    paged = {"digest": "1", "states": 2**30, "limit": None, "private": 2**22, "steps": [step] * 3}
    monkeypatch.setattr(benchmark, "run", lambda name, argv: {"error": "ended"} if "un" in name else paged)
    benchmark.main(["--directory", "/var/tmp"])
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in out.splitlines() if line.startswith("|")]
    assert cells[2:] == [["-"] * 7] * 2 + [["1.50", "1.50", "-", "0.50", "4", "1", "2"]] * 2
    assert "unpaged, no limit: ended\nunpaged, limited: ended\n" in out

    monkeypatch.setattr(benchmark, "run", lambda name, argv: {"error": "status -9"})
    with pytest.raises(RuntimeError, match="unpaged, no limit: status -9"):
        benchmark.main(["--directory", "/var/tmp"])


def test_benchmark_does_not_time_what_is_wrong(monkeypatch):
    def run(name, argv):
        return {"digest": name, "states": 0, "limit": None}

    monkeypatch.setattr(benchmark, "run", run)
    with pytest.raises(benchmark.VerificationError, match="different parameters"):
        benchmark.main(["--directory", "/var/tmp"])
    with pytest.raises(UserWarning, match="stay in memory"):
        benchmark.main(["--directory", "/dev/shm"])
    with pytest.raises(SystemExit):
        benchmark.main(["--params", "1000"])

"""gpu_bundle's parts: what the stages run and in which order, what makes a machine unusable, the report, the bundle."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpu_bundle import environment, make, markdown, plan, record, sanitizer
from gpu_bundle.events import Skipped
from gpu_bundle.pytest_events import families_in_turn, spread

TESTS = Path(__file__).parents[1]


# ---- what is run -----------------------------------------------------------------------------------------------


def test_every_test_for_any_kernels_is_in_a_stage():
    """What `make test-gpu` runs, a stage runs."""
    asks = re.compile(
        r"backends\.on_every_backend|import on_every_backend|usefixtures\(\"(gpu|backend)\"\)"
        r"|def test_\w+\([^)]*\b(backend|on_cuda|gpu)\b"
    )
    files = {str(path.relative_to(TESTS.parent)): path.read_text() for path in TESTS.rglob("test_*.py")}
    about_backends = {"tests/cuda/test_backends.py", "tests/cuda/test_gpu_bundle_parts.py"}
    found = {name for name, text in files.items() if asks.search(text)} - about_backends
    assert found == {file for stage in plan.STAGES for file in stage.tests}


@pytest.mark.parametrize("name", ["test_on_cuda", "test_gpu"])
def test_every_test_of_a_shared_file_is_in_one_stage(name):
    """As their names choose it."""
    file = f"tests/cuda/{name}.py"
    chosen = [stage.chosen for stage in plan.STAGES if file in stage.tests]
    for test in re.findall(r"^def (test_\w+)", (TESTS.parent / file).read_text(), re.MULTILINE):
        stages = [words for words in chosen if selects(words, test)]
        assert len(stages) == (0 if "sanitizer" in test else 1), (
            f"{test} in {stages}"
        )  # the sanitizer is a stage itself


def selects(words: str, test: str) -> bool:
    """pytest's -k, as far as the stages use it."""
    return all((word.removeprefix("not ") in test) != word.startswith("not ") for word in words.split(" and "))


def test_a_dry_run_takes_the_simulator_and_every_eighth_test_of_a_sweep():
    sweep = next(stage for stage in plan.STAGES if stage.large)
    assert "cuda" in sweep.command(False) and "--every" not in sweep.command(False)
    assert sweep.command(True)[-len(sweep.tests) - 4 : -len(sweep.tests)] == [
        "--backends",
        "cuda_on_cpu",
        "--every",
        "8",
    ]
    speed = plan.STAGES[-1]
    assert speed.command(True) == [*speed.command(False), "--dry-run"]


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 100])
def test_every_beginning_is_an_even_sample(n):
    names = [str(i) for i in range(n)]
    order = spread(names)
    assert sorted(order, key=int) == names
    for k in (2, 4, 8):
        parts = {int(name) * k // n for name in order[: 2 * k]}
        assert n < 2 * k or len(parts) == k


def test_files_take_turns():
    names = [f"{file}::{i}" for file, n in (("a", 3), ("b", 1), ("c", 2)) for i in range(n)]
    assert families_in_turn(names) == ["a::0", "b::0", "c::0", "a::2", "c::1", "a::1"]


# ---- what makes a machine unusable -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "cuda", "said"),
    [
        ("2.9.1+cu128", "12.8", "torch 2.9.1+cu128 is too old: bnbops needs torch 2.10 or later"),
        ("1.13.0", None, "torch 1.13.0 is too old"),
        ("2.11.0+cpu", None, "torch 2.11.0+cpu is without CUDA: install one with CUDA"),
    ],
)
def test_torch_is_refused(version, cuda, said):
    with pytest.raises(environment.Unusable, match=re.escape(said)):
        environment.check_torch(version, cuda)


@pytest.mark.parametrize("version", ["2.10.0", "2.11.0+cu130", "2.14.0a0+git1", "3.0.0"])
def test_torch_is_taken(version):
    environment.check_torch(version, "13.0")


def test_drivers():
    environment.check_driver("13.0", "13.0")
    environment.check_driver("13.0", "13.4")
    environment.check_driver("13.2", "12.8")
    environment.check_driver("12.8", "")
    environment.check_driver(None, "13.0")
    with pytest.raises(environment.Unusable, match=r"driver is for CUDA 12\.8 and the bundle was built by CUDA 13\.0"):
        environment.check_driver("12.8", "13.0")


@pytest.mark.parametrize(
    ("architectures", "runs_on", "not_on"),
    [
        (["90"], [90, 100, 120], [80, 89]),
        (["90-real"], [90], [80, 100]),
        (["80-real", "90-real", "90-virtual"], [80, 86, 90, 120], [75]),
        (["86-real"], [86, 89], [80, 90]),
        ([], [75], []),  # unknown: the library itself will say
    ],
)
def test_architectures(architectures, runs_on, not_on):
    for number in runs_on:
        environment.check_architecture(divmod(number, 10), architectures, "NVIDIA A100")
    for number in not_on:
        with pytest.raises(
            environment.Unusable, match=f"A100 has {number}: .*make gpu-bundle CUDA_ARCHITECTURES={number}"
        ):
            environment.check_architecture(divmod(number, 10), architectures, "NVIDIA A100")


def test_a_cards_bandwidth(monkeypatch):
    """Two transfers a clock over the whole width; not every torch tells these."""
    card = {"name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 150754820096}
    bus = {"memory_clock_rate": 3_201_000, "memory_bus_width": 6144}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for known, bandwidth in ((card | bus, 4917), (card, None)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, known=known: SimpleNamespace(**known))
        found = environment.hardware() | environment.of_driver({"version": "570.86", "cuda": "12.8"})
        assert found["bandwidth GB/s"] == bandwidth and found["compute capability"] == "9.0"
        assert found["driver's CUDA"] == "12.8" and found["memory GB"] == 150.8


def test_without_a_gpu_there_is_one_sentence(tmp_path):
    """The command itself, on this machine, which has none."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "gpu_bundle", "--out", "report"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(TESTS)}, text=True, capture_output=True)
    assert done.returncode == 4 and re.fullmatch(r"ended: (torch .* is without CUDA|no GPU: ).*\n", done.stderr)
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {stage["verdict"] for stage in found["stages"][1:]} == {"not reached"}
    assert str(tmp_path) not in json.dumps(found) and sys.prefix not in json.dumps(found)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "eight"])
def test_minutes_are_positive(minutes, tmp_path):
    command = [sys.executable, "-m", "gpu_bundle", "--minutes", minutes]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(TESTS)}, text=True, capture_output=True)
    assert done.returncode == 2 and "positive number of minutes" in done.stderr and not [*tmp_path.iterdir()]


def test_the_shell_names_a_python_that_will_not_do(tmp_path):
    run_sh = TESTS / "gpu_bundle" / "run.sh"
    done = subprocess.run(
        [run_sh], env={"PYTHON": "/no/such/python", "PATH": "/usr/bin:/bin"}, text=True, capture_output=True
    )
    assert done.returncode == 4 and "/no/such/python is no Python 3.10 or later" in done.stderr


# ---- compute-sanitizer -----------------------------------------------------------------------------------------

BEGIN = "========= COMPUTE-SANITIZER\n"
FINE = f"{BEGIN}34 of 34 operators\n========= ERROR SUMMARY: 0 errors\n"
RACES = f"{BEGIN}34 of 34 operators\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n"
WRONG = (
    f"{BEGIN}========= Invalid __global__ read of size 4 bytes\n=========     at step_kernel+0x10\n"
    "34 of 34 operators\n========= ERROR SUMMARY: 1 error\n"
)


def test_what_compute_sanitizer_says():
    sanitizer.refuse(FINE, 0)
    sanitizer.refuse(RACES, 0)
    with pytest.raises(sanitizer.Found, match=r"^========= Invalid __global__ read of size 4 bytes\n.* at step_kernel"):
        sanitizer.refuse(WRONG, 9)
    with pytest.raises(sanitizer.Found, match="the operators fail while they are watched"):
        sanitizer.refuse(FINE, 1)
    with pytest.raises(Skipped, match=r"does not run here: .*Error: no driver"):
        sanitizer.refuse(f"{BEGIN}========= Error: no driver\n", 1)


PROGRAM = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "tool $2, caching ${PYTORCH_NO_CUDA_MEMORY_CACHING}"
while [ "$1" != python ]; do shift; done
if [ "$2" = hang ]; then sleep 600 & sleep 600; fi
echo "34 of 34 operators"
echo "========= ERROR SUMMARY: $2 errors"
"""


def test_compute_sanitizer_is_run(tmp_path):
    """A program that stands in for it."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    said = sanitizer.watch(str(program), "memcheck", ["python", "0"], tmp_path)
    assert "tool memcheck, caching 1\n34 of 34 operators\n" in said
    with pytest.raises(sanitizer.Found):
        sanitizer.watch(str(program), "memcheck", ["python", "3"], tmp_path)
    with pytest.raises(Skipped, match=r"took longer than 0\.2 seconds"):
        sanitizer.watch(str(program), "memcheck", ["python", "hang"], tmp_path, 0.2)


# ---- the report ------------------------------------------------------------------------------------------------


def test_the_report_has_no_place():
    places = {"/data/my bundle": "<bundle>", "node-17": "<host>"}
    said = [
        "File '/data/my bundle/tests/test_x.py'",
        "at /usr/lib/python3.12/site-packages/torch/a.py:7",
        "node-17: see https://pytorch.org/get-started/locally (bf16/fp32)",
    ]
    assert record.without_places({"said": said, "n": 1}, places) == {
        "said": [
            "File '<bundle>/tests/test_x.py'",
            "at <path>/a.py:7",
            "<host>: see https://pytorch.org/get-started/locally (bf16/fp32)",
        ],
        "n": 1,
    }


def recorded(folder: Path, *events: dict) -> record.Record:
    path = folder / "events"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    stage = record.StageRecord("speed", "how fast", path, begun=True, over=True, seconds=2)
    return record.Record([stage], {"commit": "abc"}, False, 480.0, 3.0)


def test_the_report_of_figures(tmp_path):
    row = {"name": "a | b", "ms": 1.5, "GB/s": 2400.0, "% of stream": 95.0, "ratio": None}
    found = recorded(
        tmp_path,
        {"facts": {"GPU": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "bandwidth GB/s": 4800}},
        {"plan": ["steps"]},
        {"start": "steps"},
        {"table": {"title": "AdamW step", "rows": [row]}},
        {"end": "steps", "outcome": "passed", "seconds": 1.0, "message": ""},
        {"done": True},
    ).data()
    assert found["verdict"] == "passed" and found["stages"][0]["tables"][0]["rows"][0]["% of card"] == 50
    said = markdown.report(found)
    assert said.startswith("# bnbops on NVIDIA H200: passed\n\ndriver 580.1, torch 2.11.0\n")
    assert "| speed | how fast | passed | 1 | 0 | 0 | 0 | 0 | 2 |" in said
    assert "| name | ms | GB/s | % of card | % of stream |\n" in said and "| a \\| b | 1.500 | 2400 | 50 | 95 |" in said
    assert "Failures" not in said and "Not reached" not in said and "| bundle: commit | abc |" in said


def test_a_report_of_many_failures_is_short(tmp_path):
    ends = [{"end": f"t{i}", "outcome": "failed", "seconds": 0, "message": "x\n```\n" + "y\n" * 50} for i in range(300)]
    said = markdown.report(recorded(tmp_path, *ends, {"done": True}).data())
    assert said.startswith("# bnbops on a machine without a usable GPU: failed")
    assert "* and 260 more, in report.json" in said and len(said.splitlines()) < 500
    assert said.count("```") == 2 * 40


# ---- the bundle ------------------------------------------------------------------------------------------------


def test_a_wheel_without_cuda_makes_no_bundle(tmp_path):
    wheel = tmp_path / "bnbops-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("bnbops/__init__.py", "")
    with pytest.raises(make.Refused, match="has no CUDA kernels"):
        make.make(wheel, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_is_packed_unless_it_is_too_large(tmp_path, monkeypatch):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "run.sh").write_text("x" * 1000)
    size, archive = make.pack(bundle)
    assert size == 1000 and archive == tmp_path / "bundle.tar.gz" and archive.stat().st_size < 1000
    monkeypatch.setattr(make, "LIMIT", 999)
    with pytest.raises(make.Refused, match=r"MiB, more than"):
        make.pack(bundle)

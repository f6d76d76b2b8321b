"""`python -m bnbops`: what it prints, its exit codes, and that the self-check notices wrong operators."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnbops
from bnbops import report
from bnbops.__main__ import main
from bnbops._library import ISAS
from bnbops.testing import self_check
from bnbops.testing.samples import SAMPLED, Sample, operator, samples


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m bnbops` in a process of its own, where NumPy cannot be imported: torch alone must do."""
    script = (
        "import runpy, sys\n"
        "sys.modules['numpy'] = None\n"
        "runpy.run_module('bnbops', run_name='__main__', alter_sys=True)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env=os.environ | environment, text=True, capture_output=True
    )


def test_prints_what_is_installed(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    assert f"bnbops {bnbops.__version__}, torch {torch.__version__}, Python 3." in output
    overrides = "(environment variable BNBOPS_ISA overrides: baseline, avx2, avx512, amx)"
    assert f"instruction set: {bnbops.isa()} {overrides}" in output
    assert f"instruction sets of this machine and build: {', '.join(torch.ops.bnbops.isas())}\n" in output
    assert f"threads: {torch.get_num_threads()} " in output
    assert f"CUDA library: {'loaded' if bnbops.has_cuda else 'none'}" in output
    lines = [line.split() for line in output.splitlines() if line.startswith("  ")]
    assert {line[0]: line[1] for line in lines} == dict.fromkeys(SAMPLED, "ok")
    assert output.endswith("all operators are right\n")


@pytest.mark.parametrize("arguments", [["--json"], ["info", "--json"], ["--json", "info"]], ids=" ".join)
def test_all_of_it_as_json(arguments, capsys, monkeypatch):
    """One document, of the keys that docs/troubleshooting.md describes, and the same exit code."""
    checks = [("right", 3, []), ("wrong", 2, ["float32: absmax wrong"])]
    monkeypatch.setattr(self_check, "run", lambda device: iter(checks))
    assert main(arguments) == 1
    said = json.loads(capsys.readouterr().out)
    operators = {name: {"samples": count, "problems": problems} for name, count, problems in checks}
    assert said["operators"]["cpu"] == operators and said["wrong"] == len(said["operators"])
    assert said["missing"] == report.missing(said)
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(said)


def test_what_is_missing_is_said(capsys, monkeypatch):
    monkeypatch.setattr(self_check, "run", lambda device: iter([]))
    monkeypatch.setattr(report, "missing", lambda found: ["CUDA kernels: there is no NVIDIA driver"])
    assert main([]) == 0
    assert "missing for CUDA kernels: there is no NVIDIA driver\n" in capsys.readouterr().out


def test_info_is_the_default_command(capsys, monkeypatch):
    monkeypatch.setattr(self_check, "run", lambda device: iter([]))
    assert main(["info"]) == 0
    named = capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr().out == named


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["info", "--nonsense"]], ids=" ".join)
def test_unknown_arguments_are_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m bnbops")


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_passes(isa):
    """In a process each, as the variable is read once. A machine that lacks one says so and which it has."""
    done = run(BNBOPS_ISA=isa)
    if done.returncode == 0:
        assert f"instruction set: {isa} " in done.stdout and "all operators are right" in done.stdout
    else:
        assert ISAS.index(isa) > ISAS.index(bnbops.isa())  # this process has the machine's best
        assert f"BNBOPS_ISA is '{isa}', but this machine and build offer:" in done.stderr


def test_unknown_instruction_set_is_refused():
    done = run(BNBOPS_ISA="mmx")
    assert done.returncode != 0
    assert "BNBOPS_ISA is 'mmx', but this machine and build offer: " in done.stderr


# ---- the self-check notices ------------------------------------------------------------------------------------


def test_wrong_operators_are_named(capsys, monkeypatch):
    """A wrong result is told by operator and sample, and the exit code is 1."""

    def sabotaged(name: str):
        if name != "quantize_blockwise":
            return operator(name)

        def quantize(*args):
            codes, absmax = operator(name)(*args)
            return codes, absmax * 2

        quantize._schema = operator(name)._schema
        return quantize

    monkeypatch.setattr(self_check, "operator", sabotaged)
    assert main([]) == 1
    output = capsys.readouterr().out
    count = len(samples("quantize_blockwise"))
    assert f"of {count} samples differ" in output
    assert "\n      float32: absmax of codes off by " in output
    assert output.count("differ") == 1 and output.endswith("operators that are wrong: 1\n")


def test_refusals_are_reported():
    sample = samples("dequantize_blockwise")[0]
    codes, absmax, *rest = sample.args
    broken = Sample("too few scales", (codes, absmax[:-1], *rest))
    problem = self_check.check("dequantize_blockwise", broken)
    assert problem.startswith("too few scales: bnbops::dequantize_blockwise: absmax has 23 elements")


SABOTAGE = {
    "a parameter": lambda a: a["params"][0].view(-1)[5].mul_(1.1),
    "a moment's scale": lambda a: a["exp_avg_absmax"][1].view(-1)[0].mul_(1.001),
    "another moment's scale": lambda a: a["exp_avg_sq_absmax"][0].view(-1)[-1].mul_(0.999),
    "a code, by one": lambda a: a["exp_avg_sq"][0].view(-1)[7].sub_(1),
    "a step": lambda a: a["steps"][1].add_(1),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_one_wrong_number_in_a_step_is_noticed(what, monkeypatch):
    """Each list of the optimizer operator is really compared."""
    name = "adam_step_"
    (sample,) = (s for s in samples(name) if s.name == "8-bit states in rows, float32")

    def step(*args, **kwargs):
        operator(name)(*args, **kwargs)
        SABOTAGE[what](Sample(sample.name, args, kwargs).arguments(operator(name)))

    step._schema = operator(name)._schema
    assert self_check.check(name, sample) is None
    monkeypatch.setattr(self_check, "operator", lambda _: step)
    assert self_check.check(name, sample) is not None


def test_a_step_that_ignores_found_inf_is_noticed(monkeypatch):
    name = "adam_step_"
    (sample,) = (s for s in samples(name) if s.name == "overflow found")

    def step(*args, found_inf, **kwargs):
        operator(name)(*args, **kwargs)

    step._schema = operator(name)._schema
    monkeypatch.setattr(self_check, "operator", lambda _: step)
    assert "changed although found_inf is set" in self_check.check(name, sample)


def test_importing_bnbops_does_not_bring_in_the_compiler():
    """Which would double the time that it takes."""
    loaded = "import bnbops, sys; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded]).returncode == 0

"""Training with 8-bit states reaches the loss of training with 32-bit states, for every optimizer on one task, on
a second one for those that update in ways of their own.

`benchmarks/convergence.py` is the longer version; docs/convergence.md has its results.
"""

import importlib
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from bnbops import optim

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]  # where Python looks when it runs the scripts
convergence = importlib.import_module("convergence")

SETTINGS = convergence.SETTINGS
ON_TEXT = ("Adam", "AdEMAMix", "Lion", "LAMB")  # two averages, three, a sign, norms
TASKS: dict[str, Callable] = {  # and the seeds whose losses are averaged
    "text": cache(lambda: (convergence.text_task(100), [0])),
    "digits": cache(lambda: (convergence.digits_task(100), [0, 1, 2])),
}


@pytest.mark.parametrize(
    ("name", "task"), [*((name, "digits") for name in SETTINGS), *((name, "text") for name in ON_TEXT)]
)
def test_8bit_states_reach_the_loss_of_32bit_states(name, task):
    """Within 2 %, on held-out data, where both have learnt and at least 90 % of the state is really in 8 bits."""
    c = convergence.compare(TASKS[task]()[0], SETTINGS[name], TASKS[task]()[1])
    for full, eight in c.runs:
        assert full.after < 0.7 * full.before and eight.after < 0.7 * eight.before
        assert full.quantized == 0 and eight.quantized > 0.9
    assert abs(c.difference) <= 0.02, f"{c.mean(1):.4f} with 8-bit states, {c.mean(0):.4f} with 32-bit states"


def test_every_family_is_there():
    families = {name.removesuffix("8bit") for name in optim.__all__ if name.endswith("8bit")}
    paged = {name for name in families if name.startswith("Paged")}  # the same operators over other memory
    assert {setting.optimizer for setting in SETTINGS.values()} == families - paged


def test_report(capsys):
    results = convergence.report(convergence.digits_task(2, width=64), ["SGD", "Lion"], [0, 1])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["| SGD", "| Lion"]
    c = results["SGD"]
    losses = [[run.after for run in pair] for pair in c.runs]
    assert c.difference == pytest.approx((losses[0][1] + losses[1][1]) / (losses[0][0] + losses[1][0]) - 1)
    assert rows[2][2:5] == [f"{c.mean(0):.4f}", f"{c.mean(1):.4f}", f"{c.difference:+.2%}"]


def test_page_has_every_optimizer_within_two_percent():
    page = (ROOT / "docs" / "convergence.md").read_text()
    tables = re.findall(r"^\| (text|digits) \|.*\n.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert [task for task, _ in tables] == list(TASKS)
    for task, table in tables:
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        assert {row[0]: float(row[1]) for row in rows} == {name: s.lr[task] for name, s in SETTINGS.items()}
        assert all(abs(float(row[4].rstrip("%"))) <= 2 for row in rows)

"""benchmarks/huggingface.py without bitsandbytes: what it refuses, its arithmetic, its page, and its process."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # where Python looks when it runs the script
huggingface = importlib.import_module("huggingface")
outputs = importlib.import_module("huggingface_outputs")
process = importlib.import_module("huggingface_process")
measure = importlib.import_module("measure")

GOOD = {"dense": 1e-6, "bitsandbytes": 1e-2, "bnbops": 1e-6, "bnbops, training": 1e-6, "truths": 0.0}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Llama, NF4, fp32", {"bnbops": 1e-5}, "bnbops is 1.0e-05 off"),
        ("Llama, NF4, fp32", {"bnbops, training": float("nan")}, "bnbops, training is nan off"),
        ("Llama, int8, fp32", {"bnbops": 1e-1}, "more than 4.0e-02"),
        ("Llama, NF4, fp32", {"truths": 1e-9}, "weights differ"),
        ("Llama, NF4 (double), fp32", {"truths": 1e-2}, "weights differ"),
    ],
)
def test_wrong_outputs_are_refused(name: str, change: dict[str, float], message: str) -> None:
    outputs.verify({"name": name, **GOOD})
    with pytest.raises(measure.VerificationError, match=message):
        outputs.verify({"name": name, **GOOD, **change})


def test_rates_and_ratios() -> None:
    rate, time = huggingface.Row("tokens/s", count=8), huggingface.Row("load, ms", scale=1e3)
    for row in (rate, time):
        row.add("dense", 1.0)
        row.add("bitsandbytes", 9.0, 4.0, 2.0)
        row.add("bnbops", 2.0)
    assert list(rate.cells().values()) == ["tokens/s", "8", "2", "4", "2.00x"]
    assert list(time.cells().values()) == ["load, ms", "1000", "4000", "2000", "2.00x"]


def test_only_what_is_between_the_markers_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rest = huggingface.PAGE.read_text().split(huggingface.BEGIN)
    after = rest.split(huggingface.END)[1]
    page = tmp_path / "page.md"
    page.write_text(before + huggingface.BEGIN + huggingface.END + after)
    monkeypatch.setattr(huggingface, "PAGE", page)
    huggingface.write("old")
    huggingface.write("new")
    assert page.read_text() == f"{before}{huggingface.BEGIN}\nnew\n{huggingface.END}{after}"


def test_a_process_answers_and_tells_its_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    call = json.loads(line)\n"
        "    if call['call'] == 'end':\n"
        "        sys.exit('the end')\n"
        "    answer = {'result': call} if call['call'] == 'echo' else {'error': 'no such call'}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    monkeypatch.setattr(process, "WORKER", worker)
    one = process.Process("bnbops", sys.executable, tmp_path / "log")
    assert one.echo(folder=tmp_path) == {"call": "echo", "folder": str(tmp_path)}
    with pytest.raises(RuntimeError, match="bnbops: no such call"):
        one.other()
    with pytest.raises(RuntimeError, match="process ended\nthe end"):
        one.end()
    one.close()

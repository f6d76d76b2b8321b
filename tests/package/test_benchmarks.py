"""benchmarks/ at tiny sizes: they verify, refuse what is wrong, and print their tables. Nothing here is timed."""

import importlib
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnbops.functional as F
import bnbops.nn
from bnbops.optim import AdamW8bit

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # where Python looks when it runs the scripts
gpu = importlib.import_module("gpu")
linear = importlib.import_module("linear")
measure = importlib.import_module("measure")
overhead = importlib.import_module("overhead")
optim_step = importlib.import_module("optim_step")
quantize = importlib.import_module("quantize")
scaling = importlib.import_module("scaling")

ALONE = ["--quick", "--peers"]
PEERS = [[]] + ([["bitsandbytes"]] if importlib.util.find_spec("bitsandbytes") else [])
COLUMNS = ["name", "ms", "ratio", "round ratio", "G/s", "B/element", "GB/s", "% of stream", "rounds"]


def tables(out: str) -> list[list[list[str]]]:
    """The cells of every Markdown table in a benchmark's output, headings included."""
    blocks = [block for block in out.split("\n\n") if block.startswith("|")]
    for block in blocks:
        assert len({len(line) for line in block.splitlines() if line.startswith("|")}) == 1, "columns are not aligned"
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line.startswith("|")]
        for block in blocks
    ]


def names(table: list[list[str]]) -> list[str]:
    assert table[0] == COLUMNS
    return [row[0] for row in table[2:]]


@pytest.mark.parametrize("peers", PEERS, ids=" ".join)
def test_optim_step(peers, capsys, tmp_path):
    sections = optim_step.main([*ALONE, *peers, "--json", str(tmp_path / "figures.json")])
    out = capsys.readouterr().out

    own = ["bnbops AdamW8bit", "bnbops AdamW8bit, e4m3", "bnbops AdamW32bit", "torch AdamW, fused"]
    large = [*own, *(["bitsandbytes AdamW8bit"] if peers else [])]
    assert [names(table)[1:] for table in tables(out)] == [large, large, own, own]
    for name in own[:2]:
        lines = [line for line in out.splitlines() if line.startswith(f"verified {name}:")]
        assert len(lines) == 4 and all(line.endswith("same bits with 1 and 2 threads") for line in lines)
    assert out.count("verified ") == sum(len(names(table)) - 1 for table in tables(out))

    assert json.loads((tmp_path / "figures.json").read_text())["sections"] == sections
    rows = {row["name"]: row for row in sections[0]["rows"]}
    assert rows["bnbops AdamW8bit"]["B/element"] == pytest.approx(8 + 4 + 4 * (1 + 4 / 256), rel=1e-3)
    assert rows["torch AdamW, fused"]["B/element"] == pytest.approx(28, rel=1e-3)
    assert rows["torch AdamW, fused"]["ratio"] == rows["torch AdamW, fused"]["round ratio"] == 1


@pytest.mark.parametrize("peers", PEERS, ids=" ".join)
def test_quantize(peers, capsys, tmp_path):
    sections = quantize.main([*ALONE, *peers, "--json", str(tmp_path / "figures.json")])
    out = capsys.readouterr().out

    inputs = [f"{d} {m} {b}" for d in ("fp32", "bf16") for m in ("dynamic", "linear", "fp8") for b in (256, 4096)]
    assert [line for line in out.splitlines() if line.startswith("verified ")] == [
        f"verified {name}: {', '.join(['bnbops', *peers])}" for name in inputs
    ]
    to_codes, to_values = (names(table)[1:] for table in tables(out))
    assert to_codes == [f"{library}, {name}" for name in inputs for library in ("bnbops", *peers)]
    assert len(to_values) == len(to_codes) + len(inputs)  # bnbops with out=
    assert {row["ratio"] for row in sections[1]["rows"] if row["name"].endswith("out=")} == {None}

    assert json.loads((tmp_path / "figures.json").read_text())["sections"] == sections
    rows = {row["name"]: row for row in sections[0]["rows"]}
    assert rows["bnbops, bf16 linear 256"]["B/element"] == 2 + 1 + 4 / 256
    assert (rows["bnbops, bf16 linear 256"]["ratio"] is not None) == bool(peers)


@pytest.mark.parametrize("peers", PEERS, ids=" ".join)
def test_linear(peers, capsys, tmp_path):
    sections = linear.main([*ALONE, *peers, "--rows", "1", "3", "--json", str(tmp_path / "figures.json")])
    out = capsys.readouterr().out

    one, three, both, int8_one, int8_three, to_codes, to_values = tables(out)
    assert all(table[0] == list(linear.COLUMNS) for table in (one, three, both, int8_one, int8_three))
    plain = ["bitsandbytes Linear4bit, plain"] if peers else []
    forward = [row[0] for row in one[4:] if row[0] != "bitsandbytes Linear4bit, repacked"]  # not on every CPU
    assert forward == ["bnbops Linear4bit", "dense", *plain]
    assert [row[0] for row in three] == [row[0] for row in one]
    assert [row[0] for row in both[4:]] == forward
    own_int8 = ["bnbops Linear8bitLt", "dense", "bnbops Linear8bitLt, training mode"]
    int8_peers = ["bitsandbytes Linear8bitLt", "bitsandbytes Linear8bitLt, training mode"] if peers else []
    for table in (int8_one, int8_three):
        assert [row[0] for row in table[4:]] == [*own_int8, *int8_peers]
    layers = sum(len(table) - 4 for table in (one, three, both, int8_one, int8_three))
    assert out.count(" off (tolerance ") == layers and out.count("same bits with 1 and 2 threads") == 5
    libraries = [f"{library}, {dtype}" for dtype in ("fp32", "bf16") for library in ("bnbops", *peers)]
    assert names(to_codes)[1:] == [name for name in names(to_values)[1:] if "out=" not in name] == libraries

    assert json.loads((tmp_path / "figures.json").read_text())["sections"] == sections
    rows = {row["name"]: row for row in sections[1]["rows"]}
    size = 256 * 256
    assert rows["bnbops Linear4bit"]["B/element"] == (size / 2 + 4 * size / 64 + 2 * 2 * 3 * 256) / (3 * size)
    assert rows["dense"]["B/element"] == (2 * size + 2 * 2 * 3 * 256) / (3 * size)
    assert rows["dense"]["vs dense"] == 1 and (rows["dense"]["vs bitsandbytes"] is not None) == bool(peers)
    assert {row["name"] for row in rows.values() if row["vs dense"] is None} == {measure.STREAM, linear.PEAK}
    passes = sections[2]["rows"][2]
    assert passes["GFLOP/s"] == pytest.approx(2 * 2 * 3 * size / (passes["ms"] / 1e3) / 1e9)


@pytest.mark.parametrize("options", [["--nested"], ["--dtype", "fp32"]], ids=" ".join)
def test_linear_options(options, capsys):
    """Verification knows scales that are quantized, too, and float32."""
    peers = [name for peer in PEERS for name in peer]
    linear.main([*ALONE, *peers, *options, "--rows", "3", "--parts", "forward", "backward", "int8"])
    assert len(tables(capsys.readouterr().out)) == 3


def test_reused_memory():
    """Run as a script, since it changes the process's malloc."""
    command = [sys.executable, "benchmarks/quantize.py", *ALONE, "--reuse-memory"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if platform.libc_ver()[0] == "glibc":
        assert result.returncode == 0, result.stderr
        assert len(tables(result.stdout)) == 2
    else:
        assert result.returncode != 0 and "needs glibc" in result.stderr


def test_missing_peers_are_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantize.main(["--quick"])
    optim_step.main(["--quick"])
    linear.main(["--quick", "--rows", "1", "--peers", "bitsandbytes"])
    out = capsys.readouterr().out
    assert out.count("bitsandbytes left out: ") == 3
    assert len(tables(out)) == 11 and not any("bitsandbytes" in row[0] for t in tables(out) for row in t)


def test_wrong_optimizer_is_not_timed(monkeypatch, capsys):
    """An optimizer that leaves the last 16 elements of one row as they were."""
    step = AdamW8bit.step

    def wrong_step(self):
        params = [param for group in self.param_groups for param in group["params"]]
        before = [param.detach().reshape(len(param), -1)[-1, -16:].clone() for param in params]
        step(self)
        for param, values in zip(params, before, strict=True):
            param.detach().view(len(param), -1)[-1, -16:] = values

    monkeypatch.setattr(AdamW8bit, "step", wrong_step)
    with pytest.raises(measure.VerificationError, match="bnbops AdamW8bit: a row is"):
        optim_step.main(ALONE)
    assert tables(capsys.readouterr().out) == []


def test_thread_dependent_optimizer_is_not_timed(monkeypatch):
    step = AdamW8bit.step

    def thread_dependent_step(self):
        step(self)
        if torch.get_num_threads() == 2:
            self.param_groups[0]["params"][-1].detach()[-1, -1] += 1e-9

    monkeypatch.setattr(AdamW8bit, "step", thread_dependent_step)
    with pytest.raises(measure.VerificationError, match="2 threads give other bits than 1"):
        optim_step.main(ALONE)


def test_wrong_codes_are_not_timed(monkeypatch, capsys):
    def off_by_one(*args, _correct=F.quantize_blockwise, **kwargs):
        codes, state = _correct(*args, **kwargs)
        codes.view(-1)[-1] += 1 if codes.view(-1)[-1] < 128 else -1
        return codes, state

    monkeypatch.setattr(F, "quantize_blockwise", off_by_one)
    with pytest.raises(measure.VerificationError, match=r"bnbops, fp32 dynamic 256: a code is .* farther"):
        quantize.main(ALONE)
    assert tables(capsys.readouterr().out) == []


def test_wrong_values_are_not_timed(monkeypatch):
    def an_ulp_off(*args, _correct=F.dequantize_blockwise, **kwargs):
        values = _correct(*args, **kwargs)
        values[-1] = torch.nextafter(values[-1], torch.tensor(2.0).to(values.dtype))
        return values

    monkeypatch.setattr(F, "dequantize_blockwise", an_ulp_off)
    with pytest.raises(measure.VerificationError, match="values are not"):
        quantize.main(ALONE)


def test_turns_and_ratios(monkeypatch):
    """Candidates in order, a slow one in few rounds only, and ratios of the rounds that both took part in."""
    order = []
    durations = {"a": [0.1, 0.1, 0.2, 0.1], "b": [0.4, 0.4], "stream": [0.1, 0.2, 0.1, 0.1]}
    now = 0.0

    def run(name):
        def call():
            nonlocal now
            order.append(name)
            now += next(remaining[name])

        return call

    remaining = {name: iter(times * 2) for name, times in durations.items()}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    candidates = [
        measure.Candidate(measure.STREAM, run("stream"), 10, 120),
        measure.Candidate("a", run("a"), 10, 40, "b"),
        measure.Candidate("b", run("b"), 10, 40, "b"),
    ]
    measure.take_turns(candidates, 8, measure.Memory(16))
    assert "".join(name[0] for name in order) == "sab" + "sa" + "sab" + "sa" + "sab" + "sa" + "sab" + "sa"
    stream, a, b = measure.results(candidates)
    assert stream["ratio"] is None and b["ratio"] == 1
    assert a["ratio"] == pytest.approx(4) and a["round ratio"] == pytest.approx(3)
    assert a["ms"] == pytest.approx(100) and a["GB/s"] == pytest.approx(40 / 0.1 / 1e9)
    assert a["% of stream"] == pytest.approx(100 * 40 / 120)


@pytest.mark.parametrize(("text", "number"), [("7", 7), ("64Ki", 65536), ("32Mi", 33554432), ("2Gi", 2**31)])
def test_count(text, number):
    assert measure.count(text) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "32M", "1.5Mi", "Mi"])
def test_count_refuses(text):
    with pytest.raises(Exception, match="positive number"):
        measure.count(text)


@pytest.mark.parametrize("peers", PEERS, ids=" ".join)
def test_optim_step_of_other_families(peers, capsys):
    optim_step.main([*ALONE, *peers, "--optimizers", "SGD", "Lion"])
    out = capsys.readouterr().out
    own = [[f"bnbops {name}{bits}bit" for bits in (8, 32)] for name in ("SGD", "Lion")]
    theirs = [[f"bitsandbytes {name}8bit"] if peers else [] for name in ("SGD", "Lion")]
    torch_sgd = ["torch SGD, fused"]
    assert [names(table)[1:] for table in tables(out)] == [own[0] + theirs[0] + torch_sgd, own[1] + theirs[1]]
    assert out.count("verified ") == 3


def test_a_wrong_family_is_refused(monkeypatch):
    class Off(optim_step.bnbops.optim.SGD32bit):
        def __init__(self, params, lr, **options):
            super().__init__(params, 1.001 * lr, **options)

    monkeypatch.setattr(optim_step.bnbops.optim, "SGD32bit", Off)
    with pytest.raises(measure.VerificationError, match=r"SGD32bit is .* off torch SGD, fused"):
        optim_step.main([*ALONE, "--optimizers", "SGD"])


def broken(call, break_last):
    """A forward whose result has a wrong last element."""

    def forward(self, x):
        result = call(self, x)
        return torch.cat([result.flatten()[:-1], break_last(result.flatten()[-1:])]).view_as(result)

    return forward


@pytest.mark.parametrize(
    ("part", "layer"), [("forward", "Linear4bit"), ("backward", "Linear4bit"), ("int8", "Linear8bitLt")]
)
def test_a_wrong_layer_is_not_timed(monkeypatch, capsys, part, layer):
    cls = getattr(bnbops.nn, layer)
    monkeypatch.setattr(cls, "forward", broken(cls.forward, torch.zeros_like))
    with pytest.raises(measure.VerificationError, match=f"bnbops {layer}: a row is .* off"):
        linear.main([*ALONE, "--rows", "3", "--parts", part])
    assert tables(capsys.readouterr().out) == []


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    """The result is right; the gradient's last column is twice what it should be."""
    forward = bnbops.nn.Linear4bit.forward

    def wrong_gradient(self, x):
        same = x.clone()
        same.register_hook(lambda grad: torch.cat([grad[:, :-1], 2 * grad[:, -1:]], dim=1))
        return forward(self, same)

    monkeypatch.setattr(bnbops.nn.Linear4bit, "forward", wrong_gradient)
    with pytest.raises(measure.VerificationError, match=r"bnbops Linear4bit: a row is .* off"):
        linear.main([*ALONE, "--rows", "3", "--parts", "backward"])


def test_a_thread_dependent_layer_is_not_timed(monkeypatch):
    ulp_off = broken(bnbops.nn.Linear4bit.forward, lambda y: y * (1 if torch.get_num_threads() == 1 else 1 + 2**-7))
    monkeypatch.setattr(bnbops.nn.Linear4bit, "forward", ulp_off)
    with pytest.raises(measure.VerificationError, match="threads give other bits"):
        linear.main([*ALONE, "--rows", "3", "--parts", "forward"])


@pytest.mark.parametrize(
    ("function", "breaks", "message"),
    [
        ("quantize_4bit", lambda result: (result[0] ^ 0x10, result[1]), "a code is .* farther"),
        ("dequantize_4bit", lambda result: result * (1 + 2**-7), "values are not"),
    ],
)
def test_wrong_4bit_functions_are_not_timed(monkeypatch, capsys, function, breaks, message):
    correct = getattr(F, function)
    monkeypatch.setattr(F, function, lambda *args, **kwargs: breaks(correct(*args, **kwargs)))
    with pytest.raises(measure.VerificationError, match=f"bnbops, fp32: {message}"):
        linear.main([*ALONE, "--parts", "quantize"])
    assert tables(capsys.readouterr().out) == []


def test_linear_refuses_odd_sizes(capsys):
    with pytest.raises(SystemExit):
        linear.main([*ALONE, "--features", "100", "256"])
    assert "multiples of 64" in capsys.readouterr().err


def test_scaling(capsys, tmp_path):
    sections = scaling.main(["--quick", "--models", "7B", "--rounds", "1", "--json", str(tmp_path / "figures.json")])
    paper, overhead = tables(capsys.readouterr().out)
    assert paper[0] == list(scaling.PAPER) and overhead[0] == list(scaling.OVERHEAD)
    assert json.loads((tmp_path / "figures.json").read_text())["sections"] == sections
    eighth = sections[0]["rows"][0]
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert eighth["ranks"] == 8 and eighth["weights"] == pytest.approx(2 * parameters / 8 / 1e9, rel=1e-6)
    assert {row["tensors"] for row in sections[1]["rows"]} == {10} and len(sections[1]["rows"]) == 5


def test_overhead(capsys, tmp_path):
    sections = overhead.main(["--quick", "--json", str(tmp_path / "figures.json")])
    out = capsys.readouterr().out
    forward, both, steps = tables(out)
    layers = ["torch Linear", "bnbops Linear4bit", "bnbops Linear4bit, nested", "bnbops Linear8bitLt"]
    assert [row[0] for row in forward[2:]] == [row[0] for row in both[2:]] == layers
    assert [row[:2] for row in steps[2:]] == [["bnbops AdamW8bit", "10"], ["torch AdamW, fused", "10"]]
    assert out.count(" off (tolerance ") == 2 * len(layers)
    assert json.loads((tmp_path / "figures.json").read_text())["sections"] == sections
    assert sections[0]["rows"][0]["vs torch"] == 1


def test_gpu_says_that_there_is_none(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--json", str(tmp_path / "figures.json")]) == []
    said = capsys.readouterr().out
    assert said.startswith("no GPU: ") and said.count("\n") == 1
    assert not (tmp_path / "figures.json").exists()


def test_gpu_on_the_cpu(capsys):
    """The same sections with the CPU in the GPU's place."""
    peers = [name for peer in PEERS for name in peer]
    sections = list(gpu.run(gpu.arguments([*ALONE, *peers, "--rows", "1"]), "cpu"))
    titles = [section["title"].split(",")[0] for section in sections]
    steps, others = (
        ["AdamW step"] * 4,
        ["quantize_blockwise", "dequantize_blockwise", "quantize_4bit", "dequantize_4bit"],
    )
    assert titles == [*steps, *others, "NF4 256x256 bf16", "NF4 256x256 bf16", "int8 256x256 bf16"]
    assert len(tables(capsys.readouterr().out)) == len(titles)


def test_a_gpus_clock_starts_behind_what_is_queued(monkeypatch):
    """So that a call's launches have been made when the device comes to them."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("synchronize")

        def elapsed_time(self, end):
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    assert measure.seconds_on_gpu(lambda: order.append("run")) == 0.0025
    assert order == ["sleep", "record", "run", "record", "synchronize"]

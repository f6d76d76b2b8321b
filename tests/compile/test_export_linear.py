"""Quantized models that are exported: saved and loaded elsewhere, and compiled ahead of time for Python and C++."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bnbops
from bnbops.__main__ import main
from bnbops.nn import Linear4bit, Linear8bitLt
from bnbops.versions import torch_is
from cases.quantized import EMBEDDINGS, IN, LINEARS, OUT, TOKENS, features, gradients, quantized

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp_inference"
sys.path.insert(0, str(EXAMPLE))  # where Python looks when it runs the script
example = importlib.import_module("export")

STRICT = (
    "nf4 nested",
    "int8 with outliers",
    "int8 of a float weight",
    "experts nested",
    "parametrized",
    "embedding int8",
)
ROWS = (1, 2, 5, 64)
LOAD = """
import sys
from pathlib import Path

import torch

import bnbops

for path in Path(sys.argv[1]).glob("*.pt2"):
    module = torch.export.load(path).module()
    inputs = torch.load(path.with_suffix(".in"), weights_only=True)
    torch.save([module(x).detach() for x in inputs], path.with_suffix(".out"))
"""

Case = tuple[nn.Module, list[Tensor]]


def cases() -> dict[str, Case]:
    """Modules, each with inputs whose first dimension differs."""
    torch.manual_seed(0)
    found: dict[str, Case] = {
        kind: (quantized(make), [features(rows) for rows in ROWS]) for kind, make in LINEARS.items()
    }
    for kind, make in EMBEDDINGS.items():
        module = quantized(make, torch.bfloat16)
        found[f"embedding {kind}"] = (module, [torch.randint(TOKENS, (rows, 3)) for rows in ROWS])
    return found


CASES = cases()
EXPORTS = [(kind, False) for kind in CASES] + [(kind, True) for kind in STRICT]


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """What another process, which gets nothing but files, makes of the exported modules."""
    folder = tmp_path_factory.mktemp("exported")
    for kind, strict in EXPORTS:
        module, inputs = CASES[kind]
        sizes = {0: torch.export.Dim("rows", min=1, max=64)}
        program = torch.export.export(module, (inputs[2],), dynamic_shapes=(sizes,), strict=strict)
        torch.export.save(program, folder / f"{kind} {strict}.pt2")
        torch.save(inputs, folder / f"{kind} {strict}.in")
    done = subprocess.run([sys.executable, "-c", LOAD, folder], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.out")}


@pytest.mark.every_torch
@pytest.mark.parametrize(("kind", "strict"), EXPORTS, ids=lambda value: {True: "strict", False: ""}.get(value, value))
def test_loaded_elsewhere(kind: str, strict: bool, reloaded: dict[str, list[Tensor]]) -> None:
    """The bits of eager for every number of rows."""
    module, inputs = CASES[kind]
    expected = [module(x).detach() for x in inputs]
    assert len(expected) == len(ROWS) and all(map(torch.equal, reloaded[f"{kind} {strict}"], expected))


FROZEN = [kind for kind in LINEARS if kind != "int8 of a float weight"]


@pytest.mark.parametrize("kind", FROZEN)
def test_gradients(kind: str) -> None:
    """To the input and the bias, through an exported module."""
    module, inputs = CASES[kind]
    exported = torch.export.export(module, (inputs[2],)).module()
    actual, expected = gradients(exported, exported, inputs[2]), gradients(module, module, inputs[2])
    assert len(actual) == len(expected) and all(map(torch.equal, actual, expected))


def test_nothing_dense_is_saved(tmp_path: Path) -> None:
    """The file holds the packed weights, and one call for each layer."""
    model = nn.Sequential(Linear4bit(1024, 512, quant_type="nf4"), Linear8bitLt(512, 256, True, False)).to("cpu").eval()
    program = torch.export.export(model, (torch.zeros(3, 1024),))
    torch.export.save(program, tmp_path / "model.pt2")
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert held < (tmp_path / "model.pt2").stat().st_size < held + 50_000 < 0.25 * 4 * (1024 * 512 + 512 * 256)
    calls = [str(node.target) for node in program.graph.nodes if "bnbops" in str(node.target)]
    assert calls == ["bnbops.linear_4bit.default", "bnbops.linear_int8.default"]
    assert program.state_dict.keys() == {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}


def test_autocast_is_part_of_what_is_exported() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(Linear4bit(IN, OUT), Linear8bitLt(OUT, 8, True, False)).to("cpu")

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.layers(x)

    model = Model()
    out = torch.export.export(model, (features(5),)).module()(features(5))
    assert out.dtype == torch.bfloat16 and torch.equal(out, model(features(5)))


# ---- compiled ahead of time ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that examples/cpp_inference/export.py writes: the one compilation of this file."""
    if not torch_is("2.13"):
        pytest.skip("AOTInductor before torch 2.13 hands operators another dtype than the program has")
    folder = tmp_path_factory.mktemp("written")
    quick = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
    with torch._inductor.config.patch(quick):
        example.main(["--out", str(folder)])
    return folder


@pytest.mark.every_torch
def test_package_in_python(written: Path) -> None:
    """Bit for bit: all that the compiler generates here is a maximum and a ReLU, which round nothing."""
    model, package = example.quantized(), torch._inductor.aoti_load_package(str(written / "classifier.pt2"))
    for shape in ((4, 12), (1, 12), (33, 1), (7, 100)):
        tokens = torch.randint(example.VOCABULARY, shape)
        assert torch.equal(package(tokens), model(tokens))


def test_errors_of_operators_come_through(written: Path) -> None:
    package = torch._inductor.aoti_load_package(str(written / "classifier.pt2"))
    with pytest.raises(RuntimeError, match="bnbops::embedding_4bit: index 256 at position 0 is out of range"):
        package(torch.full((2, 12), example.VOCABULARY))


# ---- C++ -------------------------------------------------------------------------------------------------------


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, text=True, capture_output=True)


@pytest.fixture(scope="module")
def classify(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/cpp_inference, built as docs/export.md says, by the cmake of this environment if it has one."""
    if all(shutil.which(compiler) is None for compiler in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("built")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    cmake = shutil.which("cmake", path=Path(sys.executable).parent) or "cmake"
    for arguments in (["-S", EXAMPLE, "-B", folder, prefix], ["--build", folder]):
        done = run(cmake, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "classify"


def test_cpp_prints_what_python_computes(written: Path, classify: Path) -> None:
    done = run(classify, bnbops.library_path(), written / "classifier.pt2", written / "tokens.txt")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (written / "expected.txt").read_text() and len(done.stdout.splitlines()) == 6


def test_cpp_takes_other_sizes(written: Path, classify: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("7\n")
    done = run(classify, bnbops.library_path(), written / "classifier.pt2", tmp_path / "tokens.txt")
    assert done.stdout == example.lines(example.quantized()(torch.tensor([[7]])))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("1 2\n3\n", "line 2: expected as many integers as on the first line"),
        ("1 two\n", "line 1: expected"),
        ("1 256\n", "bnbops::embedding_4bit: index 256 at position 1 is out of range; the table has 256 rows"),
        (None, "cannot read"),
    ],
)
def test_cpp_says_what_is_wrong(
    tokens: str | None, message: str, written: Path, classify: Path, tmp_path: Path
) -> None:
    if tokens is not None:
        (tmp_path / "tokens.txt").write_text(tokens)
    done = run(classify, bnbops.library_path(), written / "classifier.pt2", tmp_path / "tokens.txt")
    assert done.returncode == 1 and message in done.stderr and done.stdout == ""


def test_cpp_needs_the_operators(written: Path, classify: Path, tmp_path: Path) -> None:
    missing = run(classify, tmp_path / "nothing.so", written / "classifier.pt2", written / "tokens.txt")
    assert missing.returncode == 1 and "nothing.so: cannot open shared object file" in missing.stderr
    another = Path(torch.__file__).parent / "lib" / "libtorch.so"
    without = run(classify, another, written / "classifier.pt2", written / "tokens.txt")
    assert without.returncode == 1 and "Could not find schema for bnbops::embedding_4bit" in without.stderr


def test_where_the_library_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["library"]) == 0
    assert capsys.readouterr().out == f"{bnbops.library_path()}\n"
    assert bnbops.library_path().name.startswith("libbnbops_cpu.") and bnbops.library_path().is_absolute()

"""Fixtures shared by the tests."""

import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bnbops.versions import torch_is
from cases import backends

GOLDEN = Path(__file__).parent / "golden"
_MARGIN = 67  # elements around a guarded tensor; odd, so that no vector boundary is met by chance


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backends",
        default="cpu,cuda_on_cpu",
        help=f"kernels for the tests that run on any, of {', '.join(backends.BACKENDS)} (default: %(default)s); "
        "without cpu among them, only those tests run",
    )
    parser.addoption("--every", type=int, default=1, metavar="N", help="run only every N-th test: a reduced sweep")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    any_kernels = "cpu" not in config.getoption("backends").split(",")
    every, chosen, others = config.getoption("every"), [], []
    for i, item in enumerate(items):
        fits = not any_kernels or {"backend", "on_cuda", "gpu"} & set(getattr(item, "fixturenames", ()))
        (chosen if fits and i % every == 0 else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """On an old torch, a test of what needs a later one is skipped, with the sentence that users get."""
    try:
        return (yield)
    except Exception as error:
        needed = re.search(r"(\S+ )+needs torch ([\d.]+) or later, this is torch [^:\s]+", str(error))
        if needed is None or torch_is(needed[2]):
            raise
        pytest.skip(needed[0])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames and backends.on_cpu.mark not in metafunc.definition.own_markers:
        metafunc.parametrize("backend", metafunc.config.getoption("backends").split(","), indirect=True)
    if "on_cuda" in metafunc.fixturenames:
        chosen = [name for name in metafunc.config.getoption("backends").split(",") if name != "cpu"]
        metafunc.parametrize("on_cuda", chosen, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once with each backend's kernels; `backends.on_every_backend` asks for it."""
    with backends.use(request.param):
        yield request.param


@pytest.fixture
def on_cuda(request: pytest.FixtureRequest) -> backends.OnCuda:
    """For tests that hold CUDA kernels, a GPU's or simulated ones, against the CPU's or against dense layers."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(backends.NO_GPU)
    return backends.OnCuda(request.param)


@pytest.fixture
def gpu() -> torch.device:
    """For tests of what only a GPU has."""
    if not torch.cuda.is_available():
        pytest.skip(backends.NO_GPU)
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests are single-threaded unless they say otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def golden() -> Callable[[str], dict]:
    """Loads a golden file by name. Some are left out of the sdist, and the tests that need them are skipped there."""

    def load(name: str) -> dict:
        path = GOLDEN / name
        if not path.exists() and (GOLDEN.parents[1] / "PKG-INFO").exists():
            pytest.skip(f"{name} is in the repository, and not in the sdist, which is to be small")
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)

    return load


@pytest.fixture
def guard() -> Iterator[Callable[[Tensor], Tensor]]:
    """Moves a tensor into the middle of a larger, misaligned buffer, whose other bytes no test may change."""
    margins: list[Tensor] = []

    def place(x: Tensor) -> Tensor:
        buffer = torch.empty(x.numel() + 2 * _MARGIN, dtype=x.dtype)
        buffer.view(torch.uint8).fill_(0xA5)
        margins.extend([buffer[:_MARGIN], buffer[_MARGIN + x.numel() :]])
        return buffer[_MARGIN : _MARGIN + x.numel()].view(x.shape).copy_(x)

    yield place
    for margin in margins:
        assert (margin.view(torch.uint8) == 0xA5).all(), "bytes beside a tensor were written"


@pytest.fixture
def restore_determinism(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The training examples ask torch for deterministic algorithms; the tests after theirs should not notice."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small text, alone in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{n} bottles of beer on the wall, take one down, pass it around.\n" for n in range(99)))
    return path

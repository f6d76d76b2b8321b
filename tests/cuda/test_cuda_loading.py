"""What bnbops says under a torch with CUDA when its own CUDA library is missing or broken.

make test-cuda-link tests the library itself.
"""

from collections.abc import Iterator

import pytest
import torch

import bnbops
from bnbops import _library, report
from bnbops.testing.samples import operator, samples

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="the real CUDA library may be loaded already")


@pytest.fixture(autouse=True)
def refusals(monkeypatch) -> Iterator[None]:
    """Registrations end with the test."""
    with torch.library._scoped_library("bnbops", "IMPL") as library:
        monkeypatch.setattr(_library, "implementations", library)
        yield


@pytest.fixture
def with_cuda(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def said_on_cuda(name: str) -> str:
    """By the kernel for CUDA tensors, past the dispatcher."""
    sample, *_ = samples(name)
    with pytest.raises(NotImplementedError) as raised:
        operator(name).redispatch(CUDA, *sample.args, **sample.kwargs)
    return str(raised.value)


@pytest.mark.parametrize("name", _library.device_operators())
@pytest.mark.usefixtures("with_cuda")
def test_a_missing_library_is_named_by_every_operator(name, tmp_path):
    assert _library.load_cuda_operators([str(tmp_path)]) is False
    reason = "bnbops was built without CUDA kernels: install nvcc (the CUDA toolkit) and reinstall bnbops"
    assert said_on_cuda(name) == f"bnbops::{name}: {reason}"


@pytest.mark.usefixtures("with_cuda")
def test_a_broken_library_is_a_warning_and_the_cpu_goes_on(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libbnbops_cuda.so").write_text("not a library")
    version = torch.__version__.replace("+", ".")
    why = rf"libbnbops_cuda\.so does not load under torch {version}: it is damaged.*(file too short|ELF)"
    with pytest.warns(RuntimeWarning, match=f"bnbops runs on the CPU only: {why}"):
        assert _library.load_cuda_operators([str(tmp_path)]) is False
    assert "libbnbops_cuda.so does not load" in said_on_cuda("squared_norms")
    assert torch.ops.bnbops.squared_norms([torch.full((2,), 3.0)]).item() == 18


@pytest.mark.usefixtures("with_cuda")
def test_what_the_library_was_built_for_is_known_although_it_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    said = b"\0bnbops-cuda-build toolkit=13.0.88 architectures=90-real,90-virtual\0"
    (tmp_path / "lib" / "libbnbops_cuda.so").write_bytes(said)
    monkeypatch.setattr(bnbops, "__path__", [str(tmp_path)])
    with pytest.warns(RuntimeWarning, match="bnbops runs on the CPU only"):
        _library.load_cuda_operators(bnbops.__path__)
    cuda = report.collect()["cuda"]
    assert cuda["toolkit"] == "13.0.88" and cuda["architectures"] == ["90-real", "90-virtual"]
    assert cuda["library"] == f"{tmp_path}/lib/libbnbops_cuda.so" and cuda["problem"].startswith(
        "libbnbops_cuda.so does"
    )
    assert any("libbnbops_cuda.so does not load" in sentence for sentence in report.collect()["missing"])


def test_a_torch_without_cuda_needs_no_library(tmp_path):
    assert _library.load_cuda_operators([str(tmp_path)]) is False
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("bnbops::squared_norms", "CUDA")

"""What bnbops says under a torch with CUDA when its own CUDA library is missing or broken.

make test-cuda-link tests the library itself.
"""

from collections.abc import Iterator

import pytest
import torch

from bnbops import _library
from bnbops.op_samples import operator, samples

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="the real CUDA library may be loaded already")


@pytest.fixture(autouse=True)
def refusals(monkeypatch) -> Iterator[None]:
    """Registrations end with the test."""
    with torch.library._scoped_library("bnbops", "IMPL") as library:
        monkeypatch.setattr(_library, "_refusals", library)
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
    why = rf"libbnbops_cuda\.so does not load under torch {torch.__version__.replace('+', '.')}: .*(file too short|ELF)"
    with pytest.warns(RuntimeWarning, match=f"bnbops runs on the CPU only: {why}"):
        assert _library.load_cuda_operators([str(tmp_path)]) is False
    assert "libbnbops_cuda.so does not load" in said_on_cuda("squared_norms")
    assert torch.ops.bnbops.squared_norms([torch.full((2,), 3.0)]).item() == 18


def test_a_torch_without_cuda_needs_no_library(tmp_path):
    assert _library.load_cuda_operators([str(tmp_path)]) is False
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("bnbops::squared_norms", "CUDA")

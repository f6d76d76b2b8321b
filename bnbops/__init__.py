"""8-bit optimizers and quantization as PyTorch operators, so that a whole train step compiles into one graph."""

from bnbops.versions import BNBOPS as __version__
from bnbops.versions import check_environment

check_environment()

from bnbops._library import isa, library_path, load_cuda_operators, load_operators  # noqa: E402

load_operators(__path__)
has_cuda = load_cuda_operators(__path__)

# meta_kernels' folder is beside this one: the type checker does not find it here.
from bnbops import distributed, functional, meta_kernels, nn, optim  # type: ignore[attr-defined]  # noqa: E402
from bnbops.alias import install_as_bitsandbytes, uninstall_as_bitsandbytes  # noqa: E402
from bnbops.functional.four_bit import matmul_4bit  # noqa: E402
from bnbops.functional.int8 import MatmulLtState, matmul  # noqa: E402

features = {"multi_backend"}  # as bitsandbytes tells that it is not for CUDA alone
supported_torch_devices = {"cpu", "cuda"} if has_cuda else {"cpu"}
__all__ = [
    "MatmulLtState",
    "__version__",
    "compiled_train_step",
    "distributed",
    "features",
    "functional",
    "has_cuda",
    "install_as_bitsandbytes",
    "isa",
    "library_path",
    "matmul",
    "matmul_4bit",
    "meta_kernels",
    "nn",
    "optim",
    "supported_torch_devices",
    "uninstall_as_bitsandbytes",
]

isa()  # a wrong BNBOPS_ISA fails here, not in the middle of training


def __getattr__(name: str) -> object:
    if name == "compiled_train_step":  # on first use: it brings in the compiler, which doubles the import's time
        from bnbops.compile import compiled_train_step

        return compiled_train_step
    raise AttributeError(f"module 'bnbops' has no attribute '{name}'")

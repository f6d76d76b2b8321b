"""What `import bitsandbytes` gives: bnbops, but with the version of the interface that it follows."""

from typing import Any

import bnbops
from bnbops import MatmulLtState, features, functional, matmul, matmul_4bit, nn, optim, supported_torch_devices
from bnbops.alias import finder

__version__ = finder.VERSION
__path__ = bnbops.__path__  # a package; the finder knows where its modules are
__all__ = [
    "MatmulLtState",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "nn",
    "optim",
    "supported_torch_devices",
]


def __getattr__(name: str) -> Any:
    return getattr(bnbops, name)

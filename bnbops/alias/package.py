"""What `import bitsandbytes` gives: bnbops under that name, with the version whose interface it follows."""

from typing import Any

import bnbops
from bnbops import MatmulLtState, features, functional, matmul, matmul_4bit, nn, optim, supported_torch_devices
from bnbops.alias import finder, install_as_bitsandbytes

__version__ = finder.VERSION
__path__ = bnbops.__path__
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

install_as_bitsandbytes()  # nothing was, where an environment variable brought the finder


def __getattr__(name: str) -> Any:
    return getattr(bnbops, name)

"""What `import bitsandbytes` gives: bnbops, but with the version of the interface that it follows."""

from pathlib import Path
from typing import Any

import bnbops
from bnbops import MatmulLtState, features, functional, matmul, matmul_4bit, nn, optim, supported_torch_devices
from bnbops.alias import finder

__version__ = finder.VERSION
__path__ = [str(Path(bnbops.__file__).parent)]  # a package, whose modules pkgutil lists; the finder needs no path
__all__ = ["MatmulLtState", "features", "functional", "matmul", "matmul_4bit", "nn", "optim", "supported_torch_devices"]


def __getattr__(name: str) -> Any:
    return getattr(bnbops, name)

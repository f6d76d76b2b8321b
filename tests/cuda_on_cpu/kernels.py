"""The kernels of a simulated library, each instance of a template one of its own, and which of them ran."""

import ctypes
import re
import subprocess
from pathlib import Path

from cuda_static.sass import plain_name

_FUNCTION = re.compile(r"^(\w+) [tW] (\w+|[^{\n]*\))$", re.MULTILINE)  # neither lambdas in it nor the compiler's clones
_KERNEL = re.compile(r"\w+_kernel(<.*>)?")


class Kernels:
    """Those of a library that this process has loaded."""

    def __init__(self, library: Path) -> None:
        symbols = _FUNCTION.findall(subprocess.check_output(["nm", "--demangle", library], text=True))
        names = {int(address, 16): plain_name(symbol) for address, symbol in symbols}
        self.names = {address: name for address, name in names.items() if _KERNEL.fullmatch(name)}
        self._take = ctypes.CDLL(str(library)).cusim_take_launched
        self._take.restype = ctypes.c_void_p
        (here,) = (address for address, name in names.items() if name == "cusim_take_launched")
        self._loaded_at = ctypes.cast(self._take, ctypes.c_void_p).value - here

    def take_launched(self) -> set[int]:
        """Addresses in the library of those that ran since the last call."""
        return {kernel - self._loaded_at for kernel in iter(self._take, None)}

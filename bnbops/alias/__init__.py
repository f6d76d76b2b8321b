"""bnbops under bitsandbytes' name, for libraries that import bitsandbytes."""

from __future__ import annotations

import sys
import threading

from bnbops.alias import finder

_installed = False
_turning = threading.Lock()  # not held while anything is imported: who imports bitsandbytes holds a lock and comes here


def install_as_bitsandbytes() -> None:
    """Lets `import bitsandbytes` give bnbops, in this process, until `uninstall_as_bitsandbytes()`.

    For libraries that know bitsandbytes only: Transformers, PEFT, TRL and Accelerate then quantize, train and save
    with bnbops, unmodified. Call it first; libraries that were imported before, without a bitsandbytes, are told. A
    bitsandbytes that is installed, but not imported, is shadowed. Calling it again does nothing.

    Raises:
        ImportError: the real bitsandbytes is imported already.
    """
    global _installed
    from bnbops.alias import names, operators, repair
    from bnbops.nn.layers import linear_8bit

    with _turning:
        if _installed:
            return
        module = sys.modules.get(finder.NAME)
        if module is not None and module.__name__ != finder.PACKAGE:
            raise ImportError(
                f"bitsandbytes is already imported, from {getattr(module, '__file__', None)}: call "
                "bnbops.install_as_bitsandbytes() before anything imports it, in the first lines of the program",
                name=finder.NAME,
            )
        _installed = True
        linear_8bit.cast_biases_for_good = True
        finder.install()
    names.rename()
    operators.install()
    repair.announce()


def uninstall_as_bitsandbytes() -> None:
    """Undoes `install_as_bitsandbytes()`. Does nothing where it was not called."""
    global _installed
    from bnbops.alias import names, operators, repair
    from bnbops.nn.layers import linear_8bit

    with _turning:
        if not _installed:
            return
        _installed = False
        linear_8bit.cast_biases_for_good = False
    names.restore()
    operators.uninstall()
    finder.uninstall()
    repair.withdraw()

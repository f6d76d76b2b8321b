"""Whether an optional library is there, and is late enough."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version


def require(package: str, minimum: str, what: str) -> None:
    """Refuses a library that is missing or too old, before its import fails somewhere inside.

    Args:
        package: its name as pip has it.
        minimum: the first version that will do, such as "5.23".
        what: that needs it, the subject of the message, such as "LoRA layers".

    Raises:
        ImportError: it says what is there, and how to get what is needed.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        found = None
    if found is None or _release(found) < _release(minimum):
        state = "which is not installed" if found is None else f"found {found}"
        raise ImportError(f"{what}: bnbops needs {package} {minimum} or later, {state}: pip install 'bnbops[hf]'")


def _release(text: str) -> list[int]:
    """The numbers at the front: of "5.23.0rc1", 5 and 23. A release candidate counts as its release."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    release = [int(number) for number in numbers[0].split(".")] if numbers else []
    while release and release[-1] == 0:
        release.pop()
    return release

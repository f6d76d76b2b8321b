"""Whether an optional library is there, and is late enough."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from bnbops.versions import release


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
    if found is None or release(found) < release(minimum):
        state = "which is not installed" if found is None else f"found {found}"
        raise ImportError(f"{what}: bnbops needs {package} {minimum} or later, {state}: pip install 'bnbops[hf]'")

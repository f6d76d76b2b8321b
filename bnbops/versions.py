"""Which bnbops this is, which Python and torch it needs, and what an older torch lacks.

Nothing here imports torch before `check_environment` has looked for it.
"""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, metadata

try:
    _METADATA = metadata("bnbops")  # of pyproject.toml
except PackageNotFoundError:
    raise ImportError(
        "bnbops is not installed, only its sources are here: run `pip install .` (or `pip install -e .` to work on it) "
        "in the folder of its pyproject.toml"
    ) from None

BNBOPS = _METADATA["Version"]
REQUIREMENTS: list[str] = _METADATA.get_all("Requires-Dist") or []

FEATURES = {"compiled_train_step": "2.11"}
"""What needs a later torch than bnbops itself does, as messages call it, and the first release that will do."""


def release(text: str) -> list[int]:
    """The numbers at the front: of "5.23.0rc1", 5 and 23. A release candidate counts as its release."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    parts = [int(number) for number in numbers[0].split(".")] if numbers else []
    while parts and parts[-1] == 0:
        parts.pop()
    return parts


def minimum(requirement: str) -> str:
    """Of "torch>=2.10,<3" or of ">=2.10", "2.10"; "0" if it names none."""
    found = re.search(r">=\s*([\w.]+)", requirement)
    return found[1] if found else "0"


OLDEST_PYTHON = minimum(_METADATA["Requires-Python"])
OLDEST_TORCH = minimum(next(text for text in REQUIREMENTS if re.match(r"torch\b", text)))


def check_environment() -> None:
    """Looks for what `import bnbops` cannot do without, before the loader meets it somewhere inside.

    Raises:
        ImportError: Python or torch is too old, or there is no torch; says which is needed.
    """
    python = platform.python_version()
    if release(python) < release(OLDEST_PYTHON):
        raise ImportError(f"bnbops needs Python {OLDEST_PYTHON} or later, this is Python {python}")
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(_needs_torch("bnbops", OLDEST_TORCH, "which is not installed")) from None
    if not torch_is(OLDEST_TORCH):
        raise ImportError(_needs_torch("bnbops", OLDEST_TORCH, f"this is torch {torch.__version__}"))


def torch_is(minimum: str) -> bool:
    """Whether this torch is at least such as "2.13"; a build on the way to that release counts as it."""
    import torch

    return release(torch.__version__) >= release(minimum)


def require_torch_for(feature: str) -> None:
    """Refuses one of `FEATURES` that needs a later torch than this one.

    Raises:
        NotImplementedError: says which torch it needs.
    """
    if not torch_is(FEATURES[feature]):
        import torch

        raise NotImplementedError(_needs_torch(feature, FEATURES[feature], f"this is torch {torch.__version__}"))


def _needs_torch(what: str, minimum: str, state: str) -> str:
    return f"{what} needs torch {minimum} or later, {state}: pip install 'torch>={minimum}'"

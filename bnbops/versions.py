"""Which bnbops and which torch this is, and what an older torch lacks."""

from __future__ import annotations

import re
from importlib.metadata import version

import torch

BNBOPS = version("bnbops")  # of pyproject.toml


def release(text: str) -> list[int]:
    """The numbers at the front: of "5.23.0rc1", 5 and 23. A release candidate counts as its release."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    parts = [int(number) for number in numbers[0].split(".")] if numbers else []
    while parts and parts[-1] == 0:
        parts.pop()
    return parts


def torch_is(minimum: str) -> bool:
    """Whether this torch is at least such as "2.13"; a build on the way to that release counts as it."""
    return release(torch.__version__) >= release(minimum)


def require_torch(minimum: str, what: str) -> None:
    """Refuses to do what only a later torch can.

    Args:
        minimum: the first release of torch that can, such as "2.13".
        what: that needs it, the subject of the message, such as "compiled_train_step with DTensors".

    Raises:
        NotImplementedError: this torch is older; says which one is needed.
    """
    if not torch_is(minimum):
        raise NotImplementedError(
            f"{what} needs torch {minimum} or later, this is torch {torch.__version__}: pip install 'torch>={minimum}'"
        )

"""Functions that become graphs."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_traced() -> bool:
    """Whether a compiler, or `make_fx`, records what is called."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None

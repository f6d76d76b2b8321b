"""Functions that become graphs."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_traced() -> bool:
    """Whether a compiler, or `make_fx`, records what is called."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


@torch.compiler.assume_constant_result  # within torch.compile, torch.compiler.is_exporting() is true before torch 2.13
def is_exported() -> bool:
    """Whether `torch.export` records what is called."""
    return torch.compiler.is_exporting()

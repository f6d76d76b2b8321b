"""Functions that become graphs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._guards import CompileContext
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_compiling() -> bool:
    """Whether a compiler records what this thread calls. torch's own answer (2.13) is that of the process: while one
    thread compiles, an eager step of another takes itself for compiled."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and (torch.compiler.is_exporting() or CompileContext.try_get() is not None)


def is_traced() -> bool:
    """Whether a compiler, or `make_fx`, records what is called."""
    return is_compiling() or get_proxy_mode() is not None


def traceable_weight(weight: Tensor) -> Tensor:
    """A frozen weight; under a default device (a torch function mode, which all calls go through) within a graph as a
    plain tensor, whatever its class: Dynamo (as of torch 2.14) does not trace attributes of tensors that have one."""
    if not is_compiling() or torch._C._len_torch_function_stack() == 0:
        return weight
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach()


def is_exported() -> bool:
    """Whether `torch.export` records what is called."""
    return torch.compiler.is_exporting()


# As torch.compiler.assume_constant_result, which imports the compiler: before torch 2.13, what Dynamo traces for
# torch.compile takes itself for exported.
is_exported._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo's mark

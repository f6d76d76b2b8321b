"""What the compiler needs under a default device (`torch.set_default_device`, `with torch.device(...)`).

It is a torch function mode: a call of any function of torch goes through it. Dynamo traces that, but for
`Tensor.backward` (as of torch 2.14), and for attributes of tensors that have a class of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from bnbops.tracing import is_compiling


def traceable_weight(weight: Tensor) -> Tensor:
    """A frozen weight; under a default device within a graph as a plain tensor, whatever its class."""
    if not is_compiling() or torch._C._len_torch_function_stack() == 0:
        return weight
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach()


class _Traceable(DeviceContext):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.backward:  # Dynamo knows the method, not the function behind it
            return args[0].backward(*args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]  # torch's


@contextmanager
def traceable_backward() -> Iterator[None]:
    """Lets Dynamo trace `loss.backward()`. What the traced code makes is on the default device as before."""
    modes = _get_current_function_mode_stack()
    if not modes or not isinstance(modes[0], DeviceContext):
        yield
        return
    with _Traceable(modes[0].device):
        yield

"""What Dynamo (torch 2.11 to 2.14) needs changed while it traces a whole train step."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._dynamo.variables import ConstantVariable, TensorVariable, torch_function
from torch._dynamo.variables import torch as torch_functions
from torch.optim import Optimizer
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from bnbops.versions import torch_is


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer in what Accelerate or Lightning have made of it, whose step a graph takes."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


class TraceableStep:
    """Stands in for `optimizer.step` during a call: Dynamo traces the class's own step, and `called` tells that it did.

    The note is kept here because Dynamo drops what a graph assigns to an attribute of an optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.called = False

    def __call__(self, closure: Callable[[], Any] | None = None) -> Any:
        self.called = True
        return type(self.optimizer).step(self.optimizer, closure)


def allow_as_graph_inputs(leaves: Iterable[torch.Tensor]) -> None:
    """Undo Dynamo's mark on an optimizer's parameters, which makes the next trace take them for constants."""
    for leaf in leaves:
        torch._dynamo.mark_static_address(leaf, guard=False)


class _Traceable(DeviceContext):
    """A default device (`torch.set_default_device`, `with torch.device(...)`): a torch function mode, which all calls
    go through. Dynamo traces that, but for `Tensor.backward` (as of torch 2.14): it knows the method alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.backward:
            return args[0].backward(*args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def traceable_backward() -> Iterator[None]:
    """Lets Dynamo trace `loss.backward()`. What the traced code makes is on the default device as before."""
    modes = _get_current_function_mode_stack()
    if not modes or not isinstance(modes[0], DeviceContext):
        yield
        return
    with _Traceable(modes[0].device):
        yield


_lock = threading.Lock()
_calls = 0  # under way, in any thread
_undo = ExitStack()


@contextmanager
def dynamo_mended() -> Iterator[None]:
    """For the time of a call. Calls of several threads may overlap: the last one to end puts everything back."""
    global _calls
    with _lock:
        if _calls == 0:
            _protect_shared_constants(_undo)
            _allow_gradients_of_subclasses(_undo)
            _allow_gradients_of_dtensors(_undo)
            _let_accelerate_look_for_packages(_undo)
        _calls += 1
    try:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            yield
    finally:
        with _lock:
            _calls -= 1
            if _calls == 0:
                _undo.close()


def _protect_shared_constants(undo: ExitStack) -> None:
    """Keep Dynamo from noting where it read a `p.grad` that is None on the one None that all its graphs share.

    It does so when a step clears gradients before backward(), and from then on every graph of the process may load
    that parameter's gradient where None is meant (pytorch pull request 193725; torch 2.13 and 2.14 are affected).
    """
    shared = [ConstantVariable.create(value) for value in (None, True, False)]

    def set_attribute(self: ConstantVariable, name: str, value: Any) -> None:
        if name != "source" or all(self is not constant for constant in shared):
            object.__setattr__(self, name, value)

    for constant in shared:
        constant.source = None
    ConstantVariable.__setattr__ = set_attribute
    undo.callback(delattr, ConstantVariable, "__setattr__")


def _allow_gradients_of_subclasses(undo: ExitStack) -> None:
    """Let a step read `p.grad` whatever the parameter's class, as it reads any other attribute.

    Dynamo refuses it for every subclass of Parameter, such as the weights of quantized layers, and with it all that
    looks through `model.parameters()` for gradients: clip_grad_norm_, clip_grad_value_, zero_grad. It can trace the
    attribute; the list of what it refuses is meant for `_base`.
    """
    refused = torch_function.banned_attrs
    if "grad" in refused:
        refused.remove("grad")
        undo.callback(refused.append, "grad")


def _allow_gradients_of_dtensors(undo: ExitStack) -> None:
    """Let backward() reach parameters that are DTensors. Before torch 2.13 Dynamo insists on plain fake tensors where
    it looks which parts of autograd's graph are used up; what it does with them is right for any."""
    if torch_is("2.13"):
        return
    collect = torch_functions._collect_tensors_with_sources

    def with_subclasses(var: Any) -> list[tuple[torch.Tensor, str | None]]:
        if not isinstance(var, TensorVariable):
            return collect(var)
        return [(var.as_proxy().node.meta["example_value"], var.source.name if var.source else None)]

    torch_functions._collect_tensors_with_sources = with_subclasses
    undo.callback(setattr, torch_functions, "_collect_tensors_with_sources", collect)


def _let_accelerate_look_for_packages(undo: ExitStack) -> None:
    """Let Accelerate ask which packages there are, as its optimizers and the Trainer do in every step: constants of the
    process. Before torch 2.13 Dynamo cannot trace the import system's `find_spec`."""
    imports = sys.modules.get("accelerate.utils.imports")
    if torch_is("2.13") or imports is None:
        return
    imports._is_package_available._dynamo_marked_constant = True
    undo.callback(delattr, imports._is_package_available, "_dynamo_marked_constant")

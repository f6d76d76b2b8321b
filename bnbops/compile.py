"""One graph per train step: forward, backward and optimizer compiled together.

Dynamo can trace ``loss.backward()`` (since torch 2.11) and an optimizer's operators, but only under conditions that a
user would have to know, and it trains nothing, silently, when some of them are missed. `compiled_train_step`
establishes them, and checks after every compilation that the optimizer really advanced.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Generic, ParamSpec, TypeVar, overload

import torch
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from bnbops.compile_errors import GraphBreakError, NothingTrainedError, explain
from bnbops.dynamo import TraceableStep, allow_as_graph_inputs, dynamo_mended, traceable_backward, unwrapped
from bnbops.versions import require_torch_for

__all__ = ["CompiledTrainStep", "GraphBreakError", "NothingTrainedError", "compiled_train_step"]

P = ParamSpec("P")
R = TypeVar("R")


class CompiledTrainStep(Generic[P, R]):
    """A train step compiled as one graph; made by `compiled_train_step`, called like the function it wraps.

    `graph_count` is the number of graphs compiled so far, `recompiles` what exceeds one: both stay as they are
    while a training run is healthy. `step_fn` and `optimizers` are what it was made from.
    """

    def __init__(
        self, step_fn: Callable[P, R], optimizers: tuple[Optimizer, ...], *, accumulate: bool, **compile_options: Any
    ) -> None:
        functools.update_wrapper(self, step_fn)
        self.step_fn = _looked_up(step_fn, optimizers)
        self.optimizers = optimizers
        self.accumulate = accumulate
        self.graph_count = 0
        self._optimizer_steps = [TraceableStep(optimizer) for optimizer in optimizers]
        self._steps_before: list[list[float]] | None = None  # set while a call that compiles is under way
        self._compiled = torch.compile(_with_own_code(self._traced()), fullgraph=True, **compile_options)
        for optimizer in optimizers:
            optimizer.init_state()

    @property
    def recompiles(self) -> int:
        """Graphs compiled beyond the first."""
        return max(0, self.graph_count - 1)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        leaves = self._prepare()
        for optimizer in self.optimizers:
            optimizer.hold_options()
        _reject_unseen_hooks(leaves, self.step_fn)
        self._steps_before = None
        try:
            with (
                dynamo_mended(),
                torch.compiler.config.patch(cache_key_tag=_cache_key_tag()),
                self._traceable_optimizers(),
                traceable_backward(),
            ):
                result = self._compiled(leaves, *args, **kwargs)
        except BackendCompilerFailed:
            raise  # the graph was captured; its compiler failed and says why
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise GraphBreakError(explain(error, _name(self.step_fn))) from error
        finally:
            for optimizer in self.optimizers:
                optimizer.drop_options()
            if self._steps_before is not None:
                allow_as_graph_inputs(leaves)
        if self._steps_before is not None:
            self.graph_count += 1
            self._check_progress(self._steps_before, leaves)
        return result

    def _prepare(self) -> list[torch.Tensor]:
        """Make state and learning rates what a graph can hold; return the parameters to train, in order."""
        for optimizer in self.optimizers:
            optimizer.init_state()
            for group in optimizer.param_groups:
                # A float would be a constant of the graph. torch's schedulers fill_ a tensor in place; a float that
                # somebody assigns later, or that load_state_dict brings back, ends up here again.
                if not isinstance(group["lr"], torch.Tensor):
                    group["lr"] = torch.tensor(group["lr"], dtype=torch.float64, device="cpu")
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _traced(self) -> Callable[..., R]:
        step_fn = self.step_fn

        @torch.compiler.assume_constant_result
        def on_trace() -> None:  # Dynamo runs this as plain Python whenever it traces, and never afterwards
            leaves = self._prepare()
            allow_as_graph_inputs(leaves)
            self._steps_before = self._steps()

        def train_step(leaves: list[torch.Tensor], /, *args: Any, **kwargs: Any) -> R:
            if torch.compiler.is_dynamo_compiling():
                on_trace()
            # Dynamo's backward() differentiates with respect to the graph inputs that it has met so far. A parameter
            # that it meets through optimizer.param_groups becomes a constant instead and gets no gradient, without
            # a word: so they all come in as inputs, first.
            tuple(leaf.requires_grad for leaf in leaves)
            # backward() consumed the graph behind the loss: what leaves must not refer to it.
            return tree_map_only(torch.Tensor, torch.Tensor.detach, step_fn(*args, **kwargs))

        return train_step

    @contextmanager
    def _traceable_optimizers(self) -> Iterator[None]:
        """LR schedulers put a wrapper around `optimizer.step` that Dynamo refuses; set it aside during the call."""
        wrappers = [optimizer.__dict__.get("step") for optimizer in self.optimizers]
        for step in self._optimizer_steps:
            step.called = False
            step.optimizer.__dict__["step"] = step
        try:
            yield
        finally:
            for optimizer, step, wrapper in zip(self.optimizers, self._optimizer_steps, wrappers, strict=True):
                if step.called:
                    optimizer._opt_called = True  # as the wrapper does: schedulers warn without it
                if wrapper is None:
                    del optimizer.__dict__["step"]
                else:
                    optimizer.__dict__["step"] = wrapper

    def _steps(self) -> list[list[float]]:
        """Every parameter's step counter, per optimizer. Synchronises with the device: for compiling calls only."""
        return [[float(state["step"]) for state in optimizer.state.values() if state] for optimizer in self.optimizers]

    def _check_progress(self, before: list[list[float]], leaves: Iterable[torch.Tensor]) -> None:
        for step, old, new in zip(self._optimizer_steps, before, self._steps(), strict=True):
            found_inf = getattr(step.optimizer, "found_inf", None)  # of a gradient scaler: this step is to do nothing
            if old != new or (found_inf is not None and bool(found_inf)):
                continue
            who = f"{_name(self.step_fn)}() ran, but"
            optimizer = type(step.optimizer).__name__
            if step.called:
                raise NothingTrainedError(
                    f"{who} {optimizer}.step() found no gradient and updated nothing: backward() is missing or comes "
                    "later, zero_grad() comes between backward() and step(), or the loss does not depend on the "
                    "optimizer's parameters."
                )
            if not self.accumulate:
                raise NothingTrainedError(
                    f"{who} never called step() on the {optimizer} that compiled_train_step was given. If it is meant "
                    "to accumulate gradients only, say so: compiled_train_step(step_fn, optimizer, accumulate=True)."
                )
            if all(leaf.grad is None for leaf in leaves):
                raise NothingTrainedError(
                    f"{who} left no gradient in any parameter: backward() is missing, or the loss does not depend on "
                    "the optimizer's parameters."
                )


@overload
def compiled_train_step(
    step_fn: Callable[P, R],
    optimizer: Optimizer | Iterable[Optimizer],
    *,
    accumulate: bool = ...,
    backend: str | Callable[..., Any] = ...,
    mode: str | None = ...,
    options: dict[str, Any] | None = ...,
    dynamic: bool | None = ...,
) -> CompiledTrainStep[P, R]: ...
@overload
def compiled_train_step(
    step_fn: None = ...,
    *,
    optimizer: Optimizer | Iterable[Optimizer],
    accumulate: bool = ...,
    backend: str | Callable[..., Any] = ...,
    mode: str | None = ...,
    options: dict[str, Any] | None = ...,
    dynamic: bool | None = ...,
) -> Callable[[Callable[P, R]], CompiledTrainStep[P, R]]: ...
def compiled_train_step(
    step_fn: Callable[..., Any] | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    accumulate: bool = False,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
) -> Any:
    """Compile a whole train step (forward, backward, optimizer) into one graph.

    ``step = compiled_train_step(step_fn, optimizer)``, or as a decorator ``@compiled_train_step(optimizer=optimizer)``.

    Args:
        step_fn: a plain train step: it computes a loss, calls ``loss.backward()``, ``optimizer.step()`` and
            ``optimizer.zero_grad()``, and returns tensors (alone, in a tuple, list or dict) or None. Tensors come back
            detached.
        optimizer: the bnbops optimizer that `step_fn` uses, or several; in a trainer's wrapper or without. Its state
            is created here, and every ``group["lr"]`` becomes a 0-dim float64 tensor, which schedulers update in place.
        accumulate: `step_fn` may leave the optimizer alone and only add to the gradients.
        backend, mode, options, dynamic: as for `torch.compile`.

    Returns:
        A `CompiledTrainStep`: call it like `step_fn`; ``.graph_count`` and ``.recompiles`` tell what was compiled.

    Raises:
        TypeError: no function, no optimizer, or an optimizer without ``init_state()`` (torch.optim's).
        GraphBreakError: (when called) `step_fn` cannot be one graph; nothing was run.
        NothingTrainedError: (when called) the new graph ran and updated no parameter of some optimizer.
        NotImplementedError: this torch cannot differentiate within a graph; 2.11 is the first that can.
    """
    require_torch_for("compiled_train_step")
    optimizers = _as_optimizers(optimizer, step_fn)
    if step_fn is not None and not callable(step_fn):
        raise TypeError(f"compiled_train_step: step_fn must be a function, got {type(step_fn).__name__}")
    how = {"backend": backend, "mode": mode, "options": options, "dynamic": dynamic}
    make = functools.partial(CompiledTrainStep, optimizers=optimizers, accumulate=accumulate, **how)
    return make if step_fn is None else make(step_fn)


def _as_optimizers(optimizer: Any, step_fn: Any) -> tuple[Optimizer, ...]:
    if isinstance(step_fn, Optimizer):
        raise TypeError("compiled_train_step: the optimizer goes second or by name, e.g. optimizer=opt")
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) or optimizer is None else tuple(optimizer)
    if not optimizers or any(not isinstance(each, Optimizer) for each in optimizers):
        raise TypeError("compiled_train_step: pass the optimizer (or a list of them) that the step function uses")
    optimizers = tuple(map(unwrapped, optimizers))
    for each in optimizers:
        if not callable(getattr(each, "init_state", None)):
            raise TypeError(
                f"compiled_train_step: {type(each).__name__} has no init_state(), so it cannot be part of one graph; "
                "use an optimizer from bnbops.optim"
            )
    return optimizers


def _reject_unseen_hooks(leaves: Iterable[torch.Tensor], step_fn: Callable[..., Any]) -> None:
    if any(leaf._post_accumulate_grad_hooks for leaf in leaves):
        raise GraphBreakError(
            f"{_name(step_fn)}() cannot be compiled into one graph: a parameter has a post-accumulate-grad hook, which "
            "a compiled backward() would leave out without a word. Remove it; Tensor.register_hook works."
        )


_numbers = itertools.count()


def _with_own_code(function: FunctionType) -> FunctionType:
    """A copy that shares nothing with other instances: Dynamo keeps graphs, and the limit of how many there may be, on
    code objects, and what it knows of sizes that change by the name and line of the code."""
    code = function.__code__
    own = code.replace(co_name=f"{code.co_name}_{next(_numbers)}")
    return FunctionType(own, function.__globals__, own.co_name, None, function.__closure__)


def _looked_up(step_fn: Callable[P, R], optimizers: tuple[Optimizer, ...]) -> Callable[P, R]:
    """`optimizer.step` as a function that looks it up at each call: a scheduler's wrapper of it cannot be traced."""
    owner = next((optimizer for optimizer in optimizers if step_fn == optimizer.step), None)
    return step_fn if owner is None else functools.wraps(step_fn)(lambda *args, **kwargs: owner.step(*args, **kwargs))


def _cache_key_tag() -> str:
    """Keeps apart what ranks compile. A graph of DTensors has this rank's rows in it, how many and which, but torch's
    cache on disk (2.13) knows it by global shapes: a rank would run another one's."""
    tag = torch.compiler.config.cache_key_tag
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return tag
    return f"{tag}, rank {torch.distributed.get_rank()} of {torch.distributed.get_world_size()}"


def _name(step_fn: Callable[..., Any]) -> str:
    return getattr(step_fn, "__name__", type(step_fn).__name__)

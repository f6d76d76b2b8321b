"""The one step() of all optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bnbops.dtensors import local
from bnbops.optim.core.batch import Batch, as_tensors
from bnbops.optim.core.call import Call, check
from bnbops.optim.core.norms import whole_squared_norms
from bnbops.optim.core.options import numbers_of
from bnbops.optim.core.state import Plan
from bnbops.optim.core.stateful import StatefulOptimizer
from bnbops.optim.core.transform import DirectionMemory, Transform, take
from bnbops.tracing import is_compiling, is_exported, is_traced


class Optimizer(StatefulOptimizer):
    """Base of the optimizers: parameters and their states go to one operator call a group and codecs.

    A family names the update rules that it follows, whose states, options and ranges csrc/rules/ has. Everything that
    configures a step lives in the param groups, but what `GlobalOptimManager` overrides for single parameters; that is
    looked up by `init_state()` and every `step()` outside a compiled graph.

    Unlike torch's own optimizers it can be traced whole: `step()` builds no state inside a compiled graph; call
    `init_state()` before (`bnbops.compiled_train_step` does).

    Args:
        params: parameters or param groups; float32, bfloat16 or float16. Gradients may also be float32.
        lr: of every family: the learning rate, a float or a 0-dim tensor.
        defaults: the family's options, its default `lr` among them.
        optim_bits: 8 quantizes the states of parameters with at least `min_8bit_size` elements, by their whole shape;
            32 bits remain for numbers without dimensions and for DTensors that are sharded within blocks.
        state_codec: how states are quantized: a codec's name ("dynamic8", as in bitsandbytes), "fp32" for not at all,
            or a mapping of states' names to these; states that it does not name have the default.
        args: an object whose attributes `optim_bits`, `min_8bit_size`, `percentile_clipping`, `block_wise`,
            `max_unorm` (LAMB and LARS) and `skip_zeros`, as far as it has them, take the place of the arguments.
        min_8bit_size: see `optim_bits`. For vectors it is 65,536, above any bias or norm of real models, unless it is
            given here, in `args`, in a param group or by `GlobalOptimManager`. A param group may also have
            "min_8bit_vector_size", for vectors alone.
        is_paged: keep states where they can be paged out when memory runs short: in files for parameters on the CPU,
            in unified memory for those on a CUDA device.
        percentile_clipping: scale gradients down to this percentile of their last 100 norms; 100 is off.
        block_wise: must be True.
        maximize: ascend instead of descend.
        paged_directory: for the files; the system's temporary directory by default.

    Attributes:
        fused_scaling: set True, `torch.amp.GradScaler.step` leaves it to the operator to unscale gradients and to skip
            a step with an overflow: one pass over the gradients less, and no wait for the device. Gradients are then
            clipped after `scaler.unscale_(optimizer)` only, which trainers refuse to call. False by default.

    Raises:
        ValueError: a value out of range, or one that is not supported.
    """

    _held: list[Batch] | None = None  # while a compiled step runs

    # ---- what a family may define ------------------------------------------------------------------------------

    def _operator(self, plan: Plan) -> Callable[..., None]:
        """What takes the step."""
        return getattr(torch.ops.bnbops, plan.rule.step)

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The operator's keyword arguments that are its own."""
        return numbers_of(self._rule(group), group)

    def _trust(self, call: Call, clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The operator's keyword arguments that are made from norms of gradients, beside `clip`."""
        return {}

    def _transform(self, group: Mapping[str, Any]) -> Transform | None:
        """What becomes of the directions; None where the operator takes the whole step."""
        return None

    # ---- steps -------------------------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked for by torch.amp.GradScaler, and by trainers that clip gradients between unscaling and the step."""
        return self.fused_scaling

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: gradients or states that do not fit, or an 8-bit state that was written as if it were numbers.
                No tensor has changed then. Or `make_fx` traces the step.
        """
        self._refuse_constants()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not is_compiling():
            self._prepare()
            self._watch.check(self.state)
            if self._only_creates_states():
                self.init_state()
                return loss
        # Under grad mode the compiler would clone every parameter.
        with torch.no_grad():
            self._run(self._batches())
        return loss

    @cached_property
    def _direction_memory(self) -> DirectionMemory:
        return DirectionMemory()

    def _run(self, batches: list[Batch]) -> None:
        """Batches become calls; norms of whole parameters what a call needs of them; and then operators write."""
        calls = [call for batch in batches for call in self._calls(batch)]
        transforms = [self._transform(call.plan.config) for call in calls]
        if not is_traced():  # a compiler checks all of the graph before it runs
            check(calls, in_halves=any(transforms[:1]))
        memory = DirectionMemory() if is_traced() else self._direction_memory
        for call, transform in zip(calls, transforms, strict=True):
            clip = call.clip()
            factors = {**clip, **self._trust(call, clip)}
            if transform is None:
                call.run(factors)
            else:
                take(call, transform, factors, memory)

    def _only_creates_states(self) -> bool:
        """Whether this is the step that torch.distributed.checkpoint takes to have states: gradients and lr are all 0.

        It is to change nothing. Counted, it would shift bias corrections and clip gradients to its norm of 0.
        """
        if self.state or any(group["lr"] != 0 for group in self.param_groups):
            return False
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        if any(param.grad.is_sparse for param in params):
            return False
        norms = [local(param.grad).float().norm().double() for param in params]
        return bool(norms) and not whole_squared_norms(torch.stack(norms), params).any()

    def _plans(self) -> Iterator[tuple[Plan, list[Tensor]]]:
        """All parameters, by group and override."""
        for group in self.param_groups:
            for override, params in self._overrides.partition(group["params"]):
                yield self._plan(group, override), params

    def _arguments(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"lr": config["lr"], "maximize": config["maximize"], **self._options(config)}

    def _batches(self) -> list[Batch]:
        if is_compiling() and self._held is not None:
            return self._held
        return [Batch.of(plan, params, self._arguments(plan.config)) for plan, params in self._plans()]

    def _calls(self, batch: Batch) -> list[Call]:
        """A batch's operator calls: one for all parameters whose states have the same codecs."""
        scaling = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        calls: dict[tuple[str, ...], Call] = {}
        for param in batch.params:
            if (grad := param.grad) is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients; use a dense embedding")
            state = self._state_of(param, batch.plan)
            codecs = batch.plan.codecs(state)
            if codecs not in calls:
                calls[codecs] = Call(self._operator(batch.plan), batch.plan, codecs, batch.arguments | scaling)
            calls[codecs].add(param, grad, state)
        return list(calls.values())

    def _param_lists(self) -> list[list[Tensor]]:
        """All parameters, without a look at param_groups in a graph that holds options."""
        if is_compiling() and self._held is not None:
            return [batch.params for batch in self._held]
        return [group["params"] for group in self.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients. (torch's own cannot be traced.)"""
        for params in self._param_lists():
            for param in params:
                if set_to_none:
                    param.grad = None  # unread: a compiled step would depend on what it was
                elif param.grad is not None:
                    param.grad = torch.zeros_like(param.grad)

    # ---- compiled_train_step -----------------------------------------------------------------------------------

    def hold_options(self) -> None:
        """Gathers what a step needs, with the options in tensors, for the compiled step that comes next.

        The compiler takes whatever it finds in `param_groups` for constants: a change would compile the step again.
        `bnbops.compiled_train_step` calls this before every step, and `drop_options` after it.
        """
        self._held = [
            Batch.in_graph(plan, params, as_tensors(plan, self._arguments(plan.config)))
            for plan, params in self._plans()
        ]

    def drop_options(self) -> None:
        """The compiled step is done."""
        self._held = None
        self._watch.accept()  # what it has written

    # ---- other graphs ------------------------------------------------------------------------------------------

    def tensor_options(self) -> list[dict[str, Tensor]]:
        """The present options of all parameters for `traced_step`: new tensors, in the same order at every call.

        Returns:
            For each param group, and each override of `GlobalOptimManager` in it, "lr" `[1]` and "options" `[n]`, of
            float64 (lr: as in the group).

        Raises:
            NotImplementedError: the step is no operator (`PytorchLARS`).
        """
        self._check_operators()
        self._prepare()
        return [as_tensors(plan, self._arguments(plan.config)) for plan, _ in self._plans()]

    def traced_step(self, options: list[dict[str, Tensor]]) -> None:
        """As `step()`, with options that are tensors: for functions that `make_fx`, or what is built on it, records.

        Make `options` an input of such a function; then they may change from call to call. The others, that are no
        numbers of the operator's (percentile_clipping, max_unorm, trust_clip, maximize), are constants of its graph.
        Parameters need their state before (`init_state()`). No hooks run.

        Args:
            options: as `tensor_options()` returns them.

        Raises:
            ValueError: `options` are not one for each group and override.
            RuntimeError: as `step()`; or a parameter has no state.
            NotImplementedError: the step is no operator (`PytorchLARS`).
        """
        self._check_operators()
        if not is_compiling():
            self._prepare()
        plans = list(self._plans())
        if len(options) != len(plans):
            raise ValueError(
                f"{type(self).__name__}.traced_step() got options of {len(options)} groups of parameters, but there "
                f"are {len(plans)}: pass what tensor_options() returns"
            )
        with torch.no_grad():
            self._run([Batch.in_graph(*plan, tensors) for plan, tensors in zip(plans, options, strict=True)])

    def _check_operators(self) -> None:
        if not all(hasattr(torch.ops.bnbops, rule.step) for rule in self._rules):
            raise NotImplementedError(f"the step of {type(self).__name__} is no operator that takes options as tensors")

    def _refuse_constants(self) -> None:
        """Raises RuntimeError in a function that is being traced by something that would not notice a new option."""
        if is_exported() or (is_traced() and not is_compiling()):
            raise RuntimeError(
                f"{type(self).__name__}.step() is being traced (make_fx, torch.export), which would make constants of "
                "lr, weight_decay and all other options. In a function for make_fx call "
                "optimizer.traced_step(options), and pass it options=optimizer.tensor_options() at every call; call "
                "init_state() before tracing"
            )

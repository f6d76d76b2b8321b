"""The one step() of all optimizers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bnbops.dtensors import local
from bnbops.facts import Rule
from bnbops.optim.checkpoints.checkpoint import FORMAT_VERSION
from bnbops.optim.core.batch import Batch
from bnbops.optim.core.call import Call, Plan, check
from bnbops.optim.core.manager import GlobalOptimManager
from bnbops.optim.core.norms import whole_squared_norms
from bnbops.optim.core.options import (
    COMMON_CHECKS,
    MIN_8BIT_SIZE,
    Check,
    as_numbers,
    checks_of,
    common_defaults,
    learning_rate,
    numbers_of,
    with_vector_size,
)
from bnbops.optim.core.overrides import Overrides
from bnbops.optim.core.parallel import check_param
from bnbops.optim.core.traced import TraceableOptimizer
from bnbops.optim.core.watch import Watch
from bnbops.optim.paging.paged import PagedMemory
from bnbops.optim.paging.unified import UnifiedMemory
from bnbops.tracing import is_traced


class Optimizer(TraceableOptimizer):
    """Base of the optimizers: parameters and their states go to one operator call a group and precision.

    A family names the update rules that it follows, whose states, options and ranges csrc/rules/ has. Everything that
    configures a step lives in the param groups, but what `GlobalOptimManager` overrides for single parameters; that is
    looked up by `init_state()` and every `step()` outside a compiled graph.

    Unlike torch's own optimizers it can be traced whole: `step()` builds no state inside a compiled graph; call
    `init_state()` before (`bnbops.compiled_train_step` does).

    Args:
        params: parameters or param groups; float32, bfloat16 or float16. Gradients may also be float32.
        defaults: the family's options.
        optim_bits: 8 quantizes the states of parameters with at least `min_8bit_size` elements, by their whole shape;
            32 bits remain for numbers without dimensions and for DTensors that are sharded within blocks.
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

    _rules: ClassVar[tuple[Rule, ...]] = ()  # the options tell which of them
    _checks: ClassVar[Mapping[str, Check]] = {}  # of options that are not the rules', or not as the rules have them
    _all_checks: ClassVar[Mapping[str, Check]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._all_checks = {**COMMON_CHECKS, **checks_of(cls._rules), **cls._checks}  # once: every step asks

    def __init__(
        self,
        params,
        defaults: dict[str, Any],
        optim_bits: int = 32,
        is_paged: bool = False,
        *,
        args: Any = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        maximize: bool = False,
        paged_directory: str | os.PathLike[str] | None = None,
    ) -> None:
        defaults = common_defaults(
            type(self).__name__,
            defaults,
            args,
            block_wise,
            optim_bits=optim_bits,
            min_8bit_size=min_8bit_size,
            percentile_clipping=percentile_clipping,
        )
        self.fused_scaling = False
        self._overrides = Overrides()
        self._held: list[Batch] | None = None  # while a compiled step runs
        self._paged_directory = paged_directory
        self._paged_memory: PagedMemory | None = None
        self._unified_memory: dict[torch.device, UnifiedMemory] = {}
        self._unmoved = False
        self._watch = Watch()
        defaults |= {"is_paged": is_paged, "maximize": maximize, "format_version": FORMAT_VERSION}
        super().__init__(params, defaults)
        GlobalOptimManager.get_instance().watch(self)

    # ---- what a family may define ------------------------------------------------------------------------------

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        """The rule that a group's options ask for."""
        return self._rules[0]

    def _operator(self, rule: Rule) -> Callable[..., None]:
        """What takes its step."""
        return getattr(torch.ops.bnbops, rule.step)

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The operator's keyword arguments that are its own."""
        return numbers_of(self._rule(group), group)

    def _trust(self, call: Call, scalars: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
        """The operator's keyword arguments that are made from norms."""
        return {}

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError for an option out of range, all but lr: schedulers may arrive a little below zero."""
        for name, check_option in self._all_checks.items():
            check_option(name, options[name])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, with options of their own if given.

        Raises:
            ValueError: an option out of range, or parameters on two devices, in another group, of partial sums
                (DTensors), or of FSDP1.
            OSError: no file can be made for the paged states of parameters on the CPU.
        """
        given = with_vector_size(param_group)
        options = {**self.defaults, **given}
        numbers = {"betas": as_numbers(options["betas"])} if "betas" in options else {}
        self._check_options({**options, **numbers})
        learning_rate("lr", options["lr"])
        param_group.update(given | numbers)
        super().add_param_group(param_group)
        try:
            self._check_params(param_group)
            if param_group["is_paged"] and any(local(param).device.type == "cpu" for param in param_group["params"]):
                self._files()  # a bad directory is refused at once
        except (ValueError, OSError):
            self.param_groups.pop()
            raise

    def _check_params(self, group: dict[str, Any]) -> None:
        """Raises ValueError for a new group's parameters that cannot be stepped, or not together."""
        for param in group["params"]:
            check_param(param)
        if len(devices := {str(local(param).device) for param in group["params"]}) > 1:
            raise ValueError(f"parameters on {', '.join(sorted(devices))} in one group; make a group for each device")

    # ---- steps -------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """What a compiled graph has to find done."""
        if self._paged_memory is not None:
            self._paged_memory.check_process()
        if self._unmoved:
            self.to_gpu()
        for group in self.param_groups:
            self._check_options(group)
            for param in group["params"]:  # again: FSDP1 takes parameters that an optimizer holds already
                check_param(param)
        self._overrides.look_up(self)

    def _plan(self, group: dict[str, Any], override: int) -> Plan:
        config = self._overrides.applied(group, override)
        rule = self._rule(config)
        return Plan.of(config, self._operator(rule), rule.state_names)

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
        if not torch.compiler.is_compiling():
            self._prepare()
            self._watch.check(self.state)
            if self._only_creates_states():
                self.init_state()
                return loss
        # Under grad mode the compiler would clone every parameter.
        with torch.no_grad():
            self._run([call for batch in self._batches() for call in self._calls(batch)])
        return loss

    def _run(self, calls: list[Call]) -> None:
        if not is_traced():  # a compiler checks all of the graph before it runs
            check(calls)
        for call in calls:
            call.run()

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
        if torch.compiler.is_compiling() and self._held is not None:
            return self._held
        return [Batch.of(plan, params, self._arguments(plan.config)) for plan, params in self._plans()]

    def _calls(self, batch: Batch) -> list[Call]:
        """A batch's operator calls: one for each precision."""
        scaling = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        calls: dict[bool, Call] = {}
        for param in batch.params:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients; use a dense embedding")
            state = self._state_of(param, batch.plan)
            quantized = batch.plan.absmax in state
            if quantized not in calls:
                calls[quantized] = Call(batch.plan, quantized, batch.arguments | scaling, self._trust)
            calls[quantized].add(param, state)
        return list(calls.values())

    def _param_lists(self) -> list[list[Tensor]]:
        """All parameters, without a look at param_groups in a graph that holds options."""
        if torch.compiler.is_compiling() and self._held is not None:
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

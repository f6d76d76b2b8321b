"""An optimizer but for its step: parameters, their options, and the states that these ask for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from bnbops.dtensors import local
from bnbops.facts import DEFAULT_CODEC, Rule
from bnbops.optim.checkpoints import checkpoint, interchange, torch_interchange
from bnbops.optim.checkpoints.loading import copied
from bnbops.optim.core import edit
from bnbops.optim.core.codec import in_bytes
from bnbops.optim.core.manager import GlobalOptimManager, Overrides
from bnbops.optim.core.options import (
    COMMON_CHECKS,
    MIN_8BIT_SIZE,
    Check,
    as_codecs,
    as_numbers,
    checks_of,
    common_defaults,
    learning_rate,
    with_vector_size,
)
from bnbops.optim.core.parallel import check_param
from bnbops.optim.core.state import Plan, missing_tensors
from bnbops.optim.core.watch import Watch
from bnbops.optim.paging.memory import Allocate, StateMemory
from bnbops.tracing import is_traced


class StatefulOptimizer(torch.optim.Optimizer):
    """`Optimizer` without steps; see there."""

    _rules: ClassVar[tuple[Rule, ...]] = ()  # the options tell which of them
    _checks: ClassVar[Mapping[str, Check]] = {}  # of options that are not the rules', or not as the rules have them
    _all_checks: ClassVar[Mapping[str, Check]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._all_checks = {**COMMON_CHECKS, **checks_of(cls._rules), **cls._checks}  # once: every step asks

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        optim_bits: int = 32,
        is_paged: bool = False,
        *,
        args: Any = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        percentile_clipping: int = 100,
        state_codec: str | Mapping[str, str] = DEFAULT_CODEC,
        block_wise: bool = True,
        maximize: bool = False,
        paged_directory: str | os.PathLike[str] | None = None,
    ) -> None:
        given = {"optim_bits": optim_bits, "min_8bit_size": min_8bit_size, "percentile_clipping": percentile_clipping}
        defaults = common_defaults(type(self).__name__, defaults, args, block_wise, given)
        defaults |= {"state_codec": as_codecs(state_codec), "is_paged": is_paged, "maximize": maximize}
        defaults |= {"format_version": checkpoint.FORMAT_VERSION}
        self.fused_scaling = False
        self._overrides = Overrides()
        self._memory = StateMemory(paged_directory)
        self._unmoved = False
        self._watch = Watch()
        super().__init__(params, defaults)
        GlobalOptimManager.get_instance().watch(self)

    # ---- what a family may define ------------------------------------------------------------------------------

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        """The rule that a group's options ask for."""
        return self._rules[0]

    def _initial(self, group: dict[str, Any]) -> dict[str, float]:
        """Values of states that do not begin with 0."""
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
        read = {"state_codec": as_codecs(options["state_codec"])}
        if "betas" in options:
            read["betas"] = as_numbers(options["betas"])
        self._check_options({**options, **read})
        learning_rate("lr", options["lr"])
        param_group.update(given | read)
        super().add_param_group(param_group)
        try:
            self._check_params(param_group)
            if param_group["is_paged"] and any(local(param).device.type == "cpu" for param in param_group["params"]):
                self._memory.allocator(torch.device("cpu"))  # a bad directory is refused at once
        except (ValueError, OSError):
            self.param_groups.pop()
            raise

    def _check_params(self, group: dict[str, Any]) -> None:
        """Raises ValueError for a new group's parameters that cannot be stepped, or not together."""
        for param in group["params"]:
            check_param(param)
        if len(devices := {str(local(param).device) for param in group["params"]}) > 1:
            raise ValueError(f"parameters on {', '.join(sorted(devices))} in one group; make a group for each device")

    # ---- states ------------------------------------------------------------------------------------------------

    def init_state(self) -> None:
        """Creates what is missing of the state of every parameter that requires a gradient.

        Raises:
            ValueError: GlobalOptimManager overrides an option that this optimizer does not have, or a value it refuses.
            RuntimeError: an 8-bit state was written as if it were numbers; see `set_state`.
            OSError: no room in the directory for paged states; torch.OutOfMemoryError: none on the CUDA device.
        """
        self._prepare()
        self._watch.check(self.state)
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    self._state_of(param, self._plan(group, self._overrides.number(param)))

    def reset_state(
        self, params: Tensor | Iterable[Tensor] | None = None, mask: Tensor | Iterable[Tensor] | None = None
    ) -> None:
        """Lets states begin anew, whatever their precision.

        Without a mask everything does, as before a parameter's first step: averages, the step count (so that bias
        corrections and schedules of the step begin anew, too) and the history of norms. With a mask only the elements
        do for which it is True; the others keep their very values, and the parameter its step count and its norms.

        Args:
            params: a parameter, or several; all by default. Those without a state are passed over.
            mask: bool, that broadcasts to the shape of every parameter, or a list of one for each; whole, or a DTensor
                of that shape.

        Raises:
            ValueError: a parameter that is not this optimizer's, or a mask that does not fit. Nothing has changed then.
        """
        edit.reset(self, params, mask)

    def dequantized_state(self, param: Tensor) -> dict[str, Tensor]:
        """A copy of a parameter's state in float32, whatever its precision.

        Returns:
            "step" []; every state, in the parameter's shape, a DTensor if the parameter is one; "gnorm_vec" [100] if
            norms are kept. Empty if the parameter has no state yet.

        Raises:
            ValueError: the parameter is not this optimizer's.
        """
        return edit.dequantized(self, param)

    def set_state(self, param: Tensor, values: Mapping[str, Any] | None = None, /, **states: Any) -> None:
        """Sets a parameter's state, or a part of it, by values: `set_state(param, exp_avg=x)`, or `{"exp_avg": x}`.

        8-bit states get the codes and scales that a step would write for these values. What the parameter has no state
        for yet is created. (Written in place, an 8-bit state is wrong, as it holds codes; the next step says so.)

        Args:
            param: a parameter.
            values: tensors or numbers by name, as `dequantized_state` has them: floating point, of the parameter's
                shape, whole or DTensors; "step" a whole number, "gnorm_vec" [100].
            states: the same as keywords.

        Raises:
            ValueError: the parameter is not this optimizer's, it has no state of such a name, or a value does not fit:
                its shape, infinities and NaN, something negative in an average of squares. Nothing has changed then.
            OSError: no room for paged states; torch.OutOfMemoryError: none on the CUDA device.
        """
        edit.set_values(self, param, {**(values or {}), **states})

    # ---- how they come to be -----------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """What a compiled graph has to find done."""
        self._memory.check_process()
        if self._unmoved:
            self.to_gpu()
        for group in self.param_groups:
            self._check_options(group)
            for param in group["params"]:  # again: FSDP1 takes parameters that an optimizer holds already
                check_param(param)
        self._overrides.look_up(self)

    def _plan(self, group: dict[str, Any], override: int) -> Plan:
        config = self._overrides.applied(group, override)
        return Plan.of(config, self._rule(config))

    def _state_of(self, param: Tensor, plan: Plan) -> dict[str, Tensor]:
        """A parameter's state, complete for its options."""
        state = self.state[param]
        for key in plan.needed:
            if key not in state:
                self._complete(param, state, plan)
        return state

    def _complete(self, param: Tensor, state: dict[str, Tensor], plan: Plan) -> None:
        if is_traced():
            raise RuntimeError(
                f"{type(self).__name__}.step() is being compiled, but a parameter has no optimizer state yet; call "
                "optimizer.init_state() before compiling (bnbops.compiled_train_step does it for you)"
            )
        initial, allocate = self._initial(plan.config), self._allocator(param, plan.config)
        state |= missing_tensors(param, state, plan, initial=initial, allocate=allocate)
        self._watch.look({param: state})

    def _allocator(self, param: Tensor, config: Mapping[str, Any]) -> Allocate | None:
        return self._memory.allocator(local(param).device) if config["is_paged"] else None

    @classmethod
    def _state_names(cls) -> tuple[str, ...]:
        """Of all states that a parameter may have."""
        return tuple(dict.fromkeys(name for rule in cls._rules for name in rule.state_names))

    # ---- state dicts and copies --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's format: for each parameter's number its tensors, which are the optimizer's own, and the param groups.

        Codes are bytes (torch.uint8) whatever their type: torch can neither compare nor gather all types everywhere.
        """
        state_dict = super().state_dict()
        return {**state_dict, "state": {key: in_bytes(state) for key, state in state_dict["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Loads what `state_dict()` returned, here or in the class of the same name of bitsandbytes or torch.optim.

        Tensors are copied, moved to where their parameter's states belong, and not cast; torch's states get the
        precision that this optimizer's options give them. Those of sharded parameters (DTensors) may be sharded alike
        or otherwise, or whole: every rank then takes its part.

        Args:
            state_dict: see above; it is not changed.
            move_to_device: at once. Otherwise states stay on the device they come from until the next `step()`,
                `init_state()` or `to_gpu()`; those of sharded parameters, and paged ones, are moved all the same.

        Raises:
            ValueError: the state dict does not fit this optimizer. Nothing has changed then.
        """
        checkpoint.load(self, state_dict, move_to_device)

    def to_gpu(self) -> None:
        """Moves states that `load_state_dict(..., move_to_device=False)` has left elsewhere to their parameters."""
        for param, state in self.state.items():
            device = local(param).device
            state.update({key: x.to(device) for key, x in state.items() if local(x).device != device})
        self._unmoved = False

    def bitsandbytes_state_dict(self) -> dict[str, Any]:
        """`state_dict()` as bitsandbytes' class of the same name writes it, for its `load_state_dict`.

        Raises:
            ValueError: an option that bitsandbytes' class does not have.
        """
        return interchange.to_bitsandbytes(self)

    def torch_state_dict(self) -> dict[str, Any]:
        """`state_dict()` as torch.optim's class of the same name has it, for its `load_state_dict`, in float32.

        The tensors are copies. What `GlobalOptimManager` overrides is no part of it.

        Raises:
            ValueError: there is no such class, or it lacks an option that is in use.
        """
        return torch_interchange.to_torch(self)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in ("_memory", "fused_scaling")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "defaults" in state:  # not of load_state_dict
            self._overrides = Overrides()
            self._unmoved = True  # a copy of one whose states are; where none are, it costs a look at each
            GlobalOptimManager.get_instance().watch(self)
            for group in self.param_groups:  # deepcopy and pickle put states into ordinary memory
                for param in group["params"]:
                    if group["is_paged"] and param in self.state:
                        self.state[param] = copied(param, self.state[param], self._allocator(param, group))
        self._watch = Watch()
        self._watch.look(self.state)

"""The states of an optimizer's parameters: how they come to be, and how a user reads and changes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from bnbops.dtensors import local
from bnbops.optim.checkpoints.checkpoint import CheckpointedOptimizer
from bnbops.optim.core import edit
from bnbops.optim.core.call import Plan
from bnbops.optim.core.state import Allocate, missing_tensors
from bnbops.optim.paging.paged import PagedMemory
from bnbops.optim.paging.unified import UnifiedMemory
from bnbops.tracing import is_traced


class StatefulOptimizer(CheckpointedOptimizer):
    """What `Optimizer` does with states outside a step."""

    def _plan(self, group: dict[str, Any], override: int) -> Plan:
        raise NotImplementedError

    def _initial(self, group: dict[str, Any]) -> dict[str, float]:
        """Values of states that do not begin with 0."""
        return {}

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
        state |= missing_tensors(
            param,
            state,
            plan.names,
            plan.config,
            known=self._state_names(),
            initial=self._initial(plan.config),
            allocate=self._allocator(param, plan.config),
        )
        self._watch.look({param: state})

    def _allocator(self, param: Tensor, config: dict[str, Any]) -> Allocate | None:
        if not config["is_paged"]:
            return None
        device = local(param).device
        if device.type == "cpu":
            return self._files().zeros
        if device.type != "cuda":
            wanted = "parameters on the CPU or a CUDA device"
            raise ValueError(f"is_paged=True needs {wanted}, got one on {device}; use is_paged=False")
        if device not in self._unified_memory:
            self._unified_memory[device] = UnifiedMemory(device)
        return self._unified_memory[device].zeros

    def _files(self) -> PagedMemory:
        if self._paged_memory is None:
            self._paged_memory = PagedMemory(self._paged_directory)
        return self._paged_memory

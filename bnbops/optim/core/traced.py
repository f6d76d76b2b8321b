"""Steps that a compiler or a tracer records: their options are tensors, inputs of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bnbops.optim.core.batch import Batch, as_tensors
from bnbops.optim.core.call import Call, Plan
from bnbops.optim.core.stateful import StatefulOptimizer
from bnbops.tracing import is_exported, is_traced


class TraceableOptimizer(StatefulOptimizer):
    """What `Optimizer` does for graphs."""

    def _plans(self) -> Iterator[tuple[Plan, list[Tensor]]]:
        raise NotImplementedError

    def _arguments(self, config: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _calls(self, batch: Batch) -> list[Call]:
        raise NotImplementedError

    def _run(self, calls: list[Call]) -> None:
        raise NotImplementedError

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
        if not torch.compiler.is_compiling():
            self._prepare()
        plans = list(self._plans())
        if len(options) != len(plans):
            raise ValueError(
                f"{type(self).__name__}.traced_step() got options of {len(options)} groups of parameters, but there "
                f"are {len(plans)}: pass what tensor_options() returns"
            )
        with torch.no_grad():
            batches = [Batch.in_graph(*plan, tensors) for plan, tensors in zip(plans, options, strict=True)]
            self._run([call for batch in batches for call in self._calls(batch)])

    def _check_operators(self) -> None:
        if not all(hasattr(torch.ops.bnbops, rule.step) for rule in self._rules):
            raise NotImplementedError(f"the step of {type(self).__name__} is no operator that takes options as tensors")

    def _refuse_constants(self) -> None:
        """Raises RuntimeError in a function that is being traced by something that would not notice a new option."""
        if is_exported() or (is_traced() and not torch.compiler.is_compiling()):
            raise RuntimeError(
                f"{type(self).__name__}.step() is being traced (make_fx, torch.export), which would make constants of "
                "lr, weight_decay and all other options. In a function for make_fx call "
                "optimizer.traced_step(options), and pass it options=optimizer.tensor_options() at every call; call "
                "init_state() before tracing"
            )

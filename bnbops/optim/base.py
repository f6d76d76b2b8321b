"""The one step() of all optimizers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from bnbops.optim.state import absmax_name, check_state, is_sharded, local, new_state, wants_8bit

FORMAT_VERSION = 1


class Optimizer(torch.optim.Optimizer):
    """Base of the optimizers: parameters and their states go to one operator call a group and precision.

    A family defines `_op` (a name in `torch.ops.bnbops`), `_state_names` (in the operator's order) and `_options` (the
    operator's hyperparameters from a param group). Everything that configures a step lives in the param groups, so a
    state dict, a pickle or a deep copy is complete.

    Unlike torch's own optimizers it can be traced whole: `step()` builds no state inside a compiled graph; call
    `init_state()` before (`bnbops.compiled_train_step` does).
    """

    _op: str
    _state_names: tuple[str, ...]
    _step_supports_amp_scaling = True  # torch.amp.GradScaler then leaves unscaling and skipping to the operator

    def _options(self, group: dict[str, Any]) -> dict[str, float]:
        raise NotImplementedError

    def __init__(self, params, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "format_version": FORMAT_VERSION})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, with options of their own if given.

        Raises:
            ValueError: an option out of range, or parameters that another group holds.
        """
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def init_state(self) -> None:
        """Creates the state of every parameter that requires a gradient and has none yet."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad and not self.state[param]:
                    self._init_param(param, group)

    def _init_param(self, param: Tensor, group: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{type(self).__name__}.step() is being compiled, but a parameter has no optimizer state yet; call "
                "optimizer.init_state() before compiling (bnbops.compiled_train_step does it for you)"
            )
        quantized = wants_8bit(param, group["optim_bits"], group["min_8bit_size"])
        self.state[param] = new_state(param, self._state_names, quantized)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: gradients or states that do not fit; then no tensor has changed in the group concerned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Under grad mode the compiler would clone every parameter.
        with torch.no_grad():
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        calls: dict[bool, _Call] = {}  # one for each precision
        first_absmax = absmax_name(self._state_names[0])
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients; use a dense embedding")
            state = self.state[param]
            if not state:
                self._init_param(param, group)
                state = self.state[param]
            quantized = first_absmax in state
            if quantized not in calls:
                calls[quantized] = _Call(self._state_names, quantized)
            calls[quantized].add(param, state)
        if not calls:
            return
        lr = group["lr"]
        scalars = {
            "lr": lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64),
            "maximize": group["maximize"],
            "grad_scale": getattr(self, "grad_scale", None),
            "found_inf": getattr(self, "found_inf", None),
            **self._options(group),
        }
        op = getattr(torch.ops.bnbops, self._op)
        for call in calls.values():
            call.run(op, scalars)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients. (torch's own cannot be traced.)"""
        for group in self.param_groups:
            for param in group["params"]:
                if set_to_none:
                    param.grad = None  # unread: a compiled step would depend on what it was
                elif param.grad is not None:
                    param.grad = torch.zeros_like(param.grad)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` returned. Tensors are copied, moved to their parameter's device and not cast.

        Raises:
            ValueError: the state dict does not fit this optimizer. Nothing has changed then.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        by_id = self._match_groups(state_dict)
        loaded = {by_id[key]: state for key, state in self._checked_states(state_dict, by_id).items()}

        state: dict[Tensor, Any] = defaultdict(dict)
        for param, tensors in loaded.items():
            device = local(param).device
            state[param] = {key: value.detach().clone().to(device) for key, value in tensors.items()}
        groups = [
            _merged_group(group, saved)
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        self.__setstate__({"state": state, "param_groups": groups})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _match_groups(self, state_dict: dict[str, Any]) -> dict[int, Tensor]:
        """The parameter for each id of a state dict."""
        if missing := {"state", "param_groups"} - state_dict.keys():
            raise ValueError(f"not an optimizer state dict: {sorted(missing)} missing")
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"the state dict has {len(saved_groups)} param groups, this optimizer {len(self.param_groups)}"
            )
        for i, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    f"param group {i} of the state dict has {len(saved['params'])} parameters, this optimizer's "
                    f"{len(group['params'])}"
                )
            version = saved.get("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(
                    f"param group {i} of the state dict has format_version {version}; this bnbops reads "
                    f"version {FORMAT_VERSION}"
                )
            if keys := (group.keys() - {"initial_lr"}) - saved.keys():
                raise ValueError(f"param group {i} of the state dict lacks {sorted(keys)}; is it of another optimizer?")
        ids = chain.from_iterable(saved["params"] for saved in saved_groups)
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        return dict(zip(ids, params, strict=True))

    def _checked_states(self, state_dict: dict[str, Any], by_id: dict[int, Tensor]) -> dict[int, dict[str, Tensor]]:
        states = {key: state for key, state in state_dict["state"].items() if state}
        if unknown := states.keys() - by_id.keys():
            raise ValueError(f"the state dict has states for parameters that no group holds: {sorted(unknown)}")
        for key, state in states.items():
            if problem := check_state(by_id[key], state, self._state_names):
                raise ValueError(f"state of parameter {key} (shape {list(by_id[key].shape)}): {problem}")
        return states


class _Call:
    """The tensors of one operator call, list by list in the schema's order."""

    def __init__(self, state_names: tuple[str, ...], quantized: bool) -> None:
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: list[list[Tensor]] = [[] for _ in state_names]
        self.absmax: list[list[Tensor]] = [[] for _ in state_names]
        self.steps: list[Tensor] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.keys = list(zip(state_names, self.states, strict=True))
        if quantized:
            self.keys += zip(map(absmax_name, state_names), self.absmax, strict=True)

    def add(self, param: Tensor, state: dict[str, Tensor]) -> None:
        grad = param.grad
        if is_sharded(param):
            param, grad = param.to_local(), local(grad)
            state = {key: local(tensor) for key, tensor in state.items()}
        if not param.is_contiguous():  # states are in logical order whatever the strides: work on a copy in that order
            original, param = param, param.contiguous()
            self.copies.append((original, param))
        self.params.append(param)
        self.grads.append(grad)
        self.steps.append(state["step"])
        for key, tensors in self.keys:
            tensors.append(state[key])

    def run(self, op: Callable[..., None], scalars: dict[str, Any]) -> None:
        op(self.params, self.grads, *self.states, *self.absmax, self.steps, **scalars)
        if not torch.compiler.is_compiling():
            # Operators from C++ write behind autograd's back: a backward through the old values must fail.
            torch.autograd.graph.increment_version(self.params)
        for original, copy in self.copies:
            original.copy_(copy)


def _merged_group(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A saved param group with the live parameters. A tensor lr keeps its identity: compiled steps hold it."""
    merged = {**saved, "params": group["params"]}
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(saved["lr"])
        merged["lr"] = group["lr"]
    elif isinstance(saved["lr"], Tensor):
        merged["lr"] = saved["lr"].clone()
    return merged


def _check_options(options: dict[str, Any]) -> None:
    def check(ok: bool, message: str) -> None:
        if not ok:
            raise ValueError(message)

    lr, eps, weight_decay = options["lr"], options["eps"], options["weight_decay"]
    check(not isinstance(lr, Tensor) or lr.numel() == 1, "a tensor lr must have one element")
    check(math.isfinite(lr) and lr >= 0, f"lr must be finite and not negative, got {lr}")
    check(math.isfinite(eps) and eps >= 0, f"eps must be finite and not negative, got {eps}")
    check(
        math.isfinite(weight_decay) and weight_decay >= 0,
        f"weight_decay must be finite and not negative, got {weight_decay}",
    )
    for i, beta in enumerate(options["betas"]):
        check(0 <= beta < 1, f"betas[{i}] must be in [0, 1), got {beta}")
    check(options["optim_bits"] in (8, 32), f"optim_bits must be 8 or 32, got {options['optim_bits']}")

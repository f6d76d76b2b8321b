"""The tensors of one operator call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bnbops.dtensors import is_dtensor, local
from bnbops.facts import NORM_HISTORY, UNCODED
from bnbops.optim.core.codec import absmax_name, codec_argument
from bnbops.optim.core.norms import whole_squared_norms
from bnbops.optim.core.parallel import local_grad
from bnbops.optim.core.state import Plan
from bnbops.tracing import is_traced


class Call:
    """Parameters with the same plan, whose states have the same codecs, as lists in the operator's order.

    Args:
        op: the operator, or a function with such a schema.
        plan: their options, and what states they have.
        codecs: of their states.
        scalars: the operator's keyword arguments but those made from norms.
    """

    def __init__(self, op: Callable[..., None], plan: Plan, codecs: tuple[str, ...], scalars: dict[str, Any]) -> None:
        self.op, self.plan, self.scalars, names = op, plan, {**scalars, **codec_argument(codecs)}, plan.names
        self.percentile: int = plan.config["percentile_clipping"]
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: list[list[Tensor]] = [[] for _ in names]
        self.absmax: list[list[Tensor]] = [[] for _ in names]
        self.steps: list[Tensor] = []
        self.gnorm_vecs: list[Tensor] = []
        self.whole: list[Tensor] = []  # the parameters as the user has them, sharded or not
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.keys = [("step", self.steps), *zip(names, self.states, strict=True)]
        for name, codec, scales in zip(names, codecs, self.absmax, strict=True):
            if codec != UNCODED:
                self.keys.append((absmax_name(name, codec), scales))
        if self.percentile != 100:
            self.keys.append(("gnorm_vec", self.gnorm_vecs))

    def add(self, param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        """Appends a parameter, its gradient and its state."""
        self.whole.append(param)
        if is_dtensor(param):
            grad, param = local_grad(param, grad), param.to_local()
            state = {key: local(tensor) for key, tensor in state.items()}
        if not param.is_contiguous():  # states are in logical order whatever the strides: work on a copy in that order
            original, param = param, param.contiguous()
            self.copies.append((original, param))
        self.params.append(param)
        self.grads.append(grad)
        for key, tensors in self.keys:
            tensors.append(state[key])

    @property
    def lists(self) -> list[list[Tensor]]:
        """The operator's positional arguments."""
        return [self.params, self.grads, *self.states, *self.absmax, self.steps]

    def check(self) -> None:
        """Has the operator check its arguments, and change nothing: as if a gradient scaler had found an overflow."""
        overflow = torch.ones((), dtype=torch.float32, device="cpu")  # no device has work to do
        self.op(*self.lists, **{**self.scalars, "found_inf": overflow})
        for i, vec in enumerate(self.gnorm_vecs):
            if vec.shape != (NORM_HISTORY,) or vec.dtype != torch.float32:
                raise RuntimeError(
                    f"gnorm_vec[{i}] must be float32 [{NORM_HISTORY}], got {vec.dtype} {list(vec.shape)}"
                )

    def run(self, from_norms: Mapping[str, Tensor]) -> None:
        """Takes the step, with the keyword arguments that are made from norms."""
        self.op(*self.lists, **self.scalars, **from_norms)
        self.written()

    def direct(self, part: slice, directions: list[Tensor], from_norms: Mapping[str, Tensor]) -> None:
        """Takes the first half of the step of some parameters: writes float32 directions, NaN where an element is to be
        left alone."""
        params, grads, *others = (tensors[part] for tensors in self.lists)
        operator = getattr(torch.ops.bnbops, self.plan.rule.direction)
        operator(params, grads, directions, *others, **self.scalars, **from_norms)

    def apply(self, part: slice, directions: list[Tensor], from_norms: Mapping[str, Tensor]) -> None:
        """Takes the second half, along directions. `written` comes when all parameters have it."""
        names = ("lr", "options", *(option.name for option in self.plan.rule.options))
        scalars = {name: self.scalars[name] for name in names if name in self.scalars}
        operator = getattr(torch.ops.bnbops, self.plan.rule.apply)
        operator(self.params[part], directions, self.steps[part], **scalars, **from_norms)

    def written(self) -> None:
        """Tells autograd, and the user's tensors, of the step."""
        if not is_traced():
            # Operators from C++ write behind autograd's back: a backward through the old values must fail.
            torch.autograd.graph.increment_version(self.params)
        for original, copy in self.copies:
            original.copy_(copy)

    def clip(self) -> dict[str, Tensor]:
        """ "clip", fp32 [n]: what each gradient is multiplied by, so that its norm is no outlier among the last 100;
        nothing without percentile clipping."""
        if self.percentile == 100:
            return {}
        norms = whole_squared_norms(torch.ops.bnbops.squared_norms(self.grads), self.whole)
        scaling = {name: self.scalars[name] for name in ("grad_scale", "found_inf")}
        clip = torch.ops.bnbops.percentile_clip_(
            self.gnorm_vecs, norms, self.steps, percentile=self.percentile, **scaling
        )
        return {"clip": clip}


def check(calls: list[Call], in_halves: bool) -> None:
    """Lets operators refuse before any has written. One that takes a whole step checks its own arguments first, so the
    first call may wait, unless it takes its step `in_halves`.

    Raises:
        RuntimeError: an operator refuses.
    """
    clips = any(call.gnorm_vecs for call in calls)
    for call in calls if clips or in_halves else calls[1:]:
        call.check()

"""torch's averages of weights (SWA, EMA) leave quantized tensors as they are.

`torch.optim.swa_utils.AveragedModel` averages all parameters, integers through floats: two equal codes may average to
the code below, scales that are held as bits drift, and some averages fail. Quantized tensors are frozen, so what is
right is to copy them, as AveragedModel copies buffers. torch has no hook for that: its `update_parameters` is replaced,
and for models without quantized tensors it does what it did.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bnbops.nn.kinds import quantized_weights


def _quantized_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Codes and scales, with their names."""
    weights = quantized_weights(model)
    return [(f"{path}.{name}".lstrip("."), each) for path, weight in weights for name, each in weight.tensors().items()]


class _Without:
    """A model, or an AveragedModel, as `update_parameters` sees it, without some of the tensors."""

    def __init__(self, model: nn.Module, left_out: set[int]) -> None:
        self._model, self._left_out = model, left_out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def module(self) -> _Without:
        return _Without(self._model.module, self._left_out)

    def parameters(self) -> Iterator[Tensor]:
        return (p for p in self._model.parameters() if id(p) not in self._left_out)

    def buffers(self) -> Iterator[Tensor]:
        return (b for b in self._model.buffers() if id(b) not in self._left_out)


_torch_update = AveragedModel.update_parameters


@functools.wraps(_torch_update)
def _update_parameters(self: AveragedModel, model: nn.Module) -> None:
    pairs = list(zip_longest(_quantized_tensors(self.module), _quantized_tensors(model), fillvalue=("", None)))
    for (name, averaged), (other_name, current) in pairs:
        if averaged is None or current is None or (averaged.shape, averaged.dtype) != (current.shape, current.dtype):
            raise RuntimeError(
                f"AveragedModel: {other_name or name} is {_described(current)} in the model, {_described(averaged)} in "
                "its average, and quantized tensors cannot be averaged: quantize the model before it is averaged"
            )
    left_out = {id(tensor) for pair in pairs for _, tensor in pair}
    _torch_update(_Without(self, left_out), _Without(model, left_out))
    with torch.no_grad():
        for (_, averaged), (_, current) in pairs:
            averaged.copy_(current)


def _described(tensor: Tensor | None) -> str:
    return "not quantized" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


AveragedModel.update_parameters = _update_parameters

"""Notices 8-bit states that were written as if their bytes were numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from weakref import ReferenceType, ref

from torch import Tensor

from bnbops.dtensors import is_dtensor
from bnbops.optim.core.codec import absmax_name, codec_of, dtype_of, scales_of

States = Mapping[Tensor, Mapping[str, Tensor]]  # by parameter and name


class Watch:
    """The codes of an optimizer's 8-bit states, between its steps.

    A code is a fraction of its block's scale, so whoever writes codes writes their scales, too: steps, loading and
    `Optimizer.set_state` do, and so do compiled graphs and torch.distributed.checkpoint, which reads into the tensors
    that there are. Codes that changed alone were taken for numbers, as by `zero_()`: code 0 is about minus the scale.
    (Scales that changed alone are fine: whoever did it has scaled what there was.)

    Changes are told by torch's version counters, of which a DTensor has one and its local tensor another. Operators
    from C++ do not count what they write, so that after most steps there is nothing to compare.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        # Parallel lists, one entry a counter; every parameter has a slice of them.
        self._of: list[tuple[Tensor, str]] = []  # the parameter, and the state's name
        self._codes: list[ReferenceType[Tensor]] = []
        self._scales: list[ReferenceType[Tensor]] = []
        self._seen: list[int | None] = []
        self._seen_scales: list[int | None] = []
        self._slices: dict[Tensor, slice] = {}

    def look(self, states: States) -> None:
        """Takes the states of these parameters for right, as they are now."""
        for param, state in states.items():
            found = scales_of(state)
            codes = [(name, ref(x)) for name in found for x in _counted(state[name])]
            scales = [ref(x) for kept in found.values() for x in _counted(kept)]
            part = self._slices.get(param)
            if part is None or part.stop - part.start != len(codes):
                part = self._slices[param] = slice(len(self._of), len(self._of) + len(codes))
            self._of[part] = [(param, name) for name, _ in codes]
            self._codes[part] = [x for _, x in codes]
            self._scales[part] = scales
            self._seen[part], self._seen_scales[part] = _versions(self._codes[part]), _versions(scales)

    def accept(self) -> None:
        """Takes all states that it has looked at for right, after a compiled step."""
        self._seen, self._seen_scales = _versions(self._codes), _versions(self._scales)

    def check(self, states: States) -> None:
        """Compares all states that it has looked at.

        Raises:
            RuntimeError: codes of `states` were written, or replaced, without their scales.
        """
        versions = _versions(self._codes)
        if versions == self._seen:
            return
        scales = _versions(self._scales)
        for i, (param, name) in enumerate(self._of):
            if versions[i] == self._seen[i] or scales[i] != self._seen_scales[i]:
                continue
            state = states.get(param, {})
            codec = codec_of(state, name)
            kept = state.get(absmax_name(name, codec))
            if kept is not None and any(x is self._scales[i]() for x in _counted(kept)) and _are_codes(state, name):
                raise RuntimeError(
                    f"'{name}' of a parameter of shape {list(param.shape)} was written, or replaced, since the last "
                    f"step, but not its scales, '{absmax_name(name, codec)}'. An 8-bit state holds codes, fractions of "
                    "the scales; it was taken for numbers. Change states with reset_state(), or set_state() and "
                    "dequantized_state(), whose values are float32. To go on, reset_state() this parameter or "
                    "load_state_dict() a checkpoint"
                )
        self._forget()  # they may be other tensors, or fewer
        self.look(states)


def _counted(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that count what is written to a tensor."""
    return (tensor, tensor._local_tensor) if is_dtensor(tensor) else (tensor,)


def _are_codes(state: Mapping[str, Tensor], name: str) -> bool:
    """Whether an operator would take a state for codes; else it says what is wrong."""
    tensor = state.get(name)
    return tensor is not None and tensor.dtype == dtype_of(codec_of(state, name)) and tensor.is_contiguous()


def _versions(tensors: Iterable[ReferenceType[Tensor]]) -> list[int | None]:
    """How often each has been written; -1 if it is gone, None if it does not count (made in inference mode)."""
    try:
        return [tensor()._version for tensor in tensors]  # type: ignore[union-attr]  # gone: told by the error
    except (AttributeError, RuntimeError):
        alive = [tensor() for tensor in tensors]
        return [-1 if x is None else None if x.is_inference() else x._version for x in alive]

"""bitsandbytes' optimizer checkpoints: reading them, and writing ones that bitsandbytes goes on with.

bitsandbytes keeps "state1" and "state2" of a parameter: fp32, or uint8 with codebooks "qmap1", "qmap2" and flat scales
"absmax1", "absmax2", one for 256 elements. Its 0.49 and 0.50 nest them under "__bnb_optimizer_quant_state__", older
versions keep them beside "step", an int. Our states in their order are state1 and state2; AdEMAMix has three, and
bitsandbytes stacks the first two: state1 `[2, *shape]`, absmax1 `[2, blocks]`.

Source: bitsandbytes/optim/*.py of versions 0.45.5, 0.49.2 and 0.50.2; tests/golden holds checkpoints of the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnbops.codebooks import create_dynamic_map
from bnbops.dtensors import is_dtensor
from bnbops.facts import RULES, STATE_BLOCK, STATES, UNCODED, Rule
from bnbops.optim.checkpoints.loading import check_complete
from bnbops.optim.core import codec

if TYPE_CHECKING:
    from bnbops.optim.core.stateful import StatefulOptimizer

_NESTED = "__bnb_optimizer_quant_state__"
_SCHEDULE = {"alpha", "t_alpha", "t_beta3"}  # AdEMAMix's
_GROUP_KEYS = {"params", "lr", "betas", "eps", "weight_decay", *_SCHEDULE}


@dataclass(frozen=True)
class _Storage:
    """How bitsandbytes stores the options of an update rule: all its classes share the keys "betas" and "eps"."""

    rule: Rule
    betas: tuple[str | float, ...]  # our option behind each of its "betas", or the number that is always there
    nonzero: int | None = None  # the one of its "betas" that cannot be 0
    ignored: Mapping[str, Any] = field(default_factory=dict)  # options that its kernels do not know, and what they do

    @property
    def keeps_unorm(self) -> bool:
        """Whether there is an "unorm_vec", where it writes the update's norm."""
        return self.rule.trust != "none"

    @property
    def eps(self) -> bool:
        """Whether its "eps" is not always 0."""
        return any(option.name == "eps" for option in self.rule.options)


_NO_NESTEROV = {"dampening": 0, "nesterov": False}
_COUNTERPARTS = (
    _Storage(RULES["adam"], ("betas", "betas")),
    _Storage(RULES["lamb"], ("betas", "betas"), ignored={"bias_correction": True, "adam_w_mode": True}),
    _Storage(RULES["ademamix"], ("betas", "betas", "betas")),
    _Storage(RULES["lion"], ("betas", "betas"), nonzero=1),
    _Storage(RULES["momentum"], ("momentum", "dampening"), nonzero=0, ignored=_NO_NESTEROV),
    _Storage(RULES["lars"], ("momentum", "dampening"), nonzero=0, ignored=_NO_NESTEROV),
    _Storage(RULES["rmsprop"], ("alpha", "momentum"), nonzero=0, ignored={"momentum": 0}),
    _Storage(RULES["adagrad"], (0, 0), ignored={"lr_decay": 0}),
)
_Group = dict[str, Any]
_Slots = list[tuple[int, tuple[str, ...]]]  # our states behind bitsandbytes' state1 and state2


def is_bitsandbytes(state_dict: dict[str, Any]) -> bool:
    """Whether a state dict is one of bitsandbytes' optimizers (not whether it fits any of ours)."""
    states, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(states, dict) or not groups:
        return False
    if any(states.values()):
        return any(isinstance(state, dict) and (_NESTED in state or "state1" in state) for state in states.values())
    # Saved before the first step. Ours, and torch's with betas and eps, have "maximize".
    return all({"lr", "betas", "eps", "weight_decay"} <= group.keys() and "maximize" not in group for group in groups)


def from_bitsandbytes(optimizer: StatefulOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of bitsandbytes' class of the same name, as `optimizer.load_state_dict` takes it.

    Nothing is computed: codes and scales keep their bytes, so training goes on from bitsandbytes' very state. Scales
    stay in flat blocks `[blocks]`; where rows are whole blocks that is the same as ours `[rows, blocks]`, and they get
    that shape. Options that bitsandbytes does not store (maximize, nesterov, percentile_clipping, ...) stay those of
    `optimizer`. Tensors may share the memory of `state_dict`'s.

    Raises:
        ValueError: it does not fit the optimizer's parameters, is of another optimizer, or cannot be continued exactly:
            other codebooks than the dynamic maps, options that bitsandbytes ignored.
    """
    storage, saved_groups = _storage(optimizer), state_dict["param_groups"]
    states, groups = {key: state for key, state in state_dict["state"].items() if state}, []
    for i, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        groups.append(_read_group(optimizer, storage, i, group, saved))
        slots = _slots(optimizer, groups[-1])
        for key, param in zip(saved["params"], group["params"], strict=True):
            if not (state := states.get(key)):
                continue
            state = {k: value for k, value in state.items() if k != _NESTED} | state.get(_NESTED, {})
            if problem := _state_problem(storage, slots, param, groups[-1], state):
                raise ValueError(f"bitsandbytes' state of parameter {key} (shape {list(param.shape)}): {problem}")
            states[key] = _read_state(slots, param, state)
    return {**state_dict, "state": states, "param_groups": groups}


def to_bitsandbytes(optimizer: StatefulOptimizer) -> dict[str, Any]:
    """The optimizer's state dict as bitsandbytes 0.50 writes it, for `load_state_dict` of its class of the same name.

    8-bit states keep their bytes where blocks are flat, or rows consist of whole blocks (256 divides the number of
    elements in a row). Else they are decoded and encoded again in flat blocks, the one step here that rounds. Where a
    parameter has a state of another codec, or one of them in float32, it has all of them in float32 there.

    Returns:
        State dict of plain numbers, and of tensors that may share the optimizer's memory.

    Raises:
        ValueError: an option that bitsandbytes ignores, a sharded parameter, or one whose state is incomplete.
    """
    storage, state_dict = _storage(optimizer), optimizer.state_dict()
    states, groups = {}, []
    for i, (group, saved) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"], strict=True)):
        groups.append(_write_group(optimizer, storage, i, group, saved["params"]))
        slots = _slots(optimizer, group)
        for key, param in zip(saved["params"], group["params"], strict=True):
            if not (state := state_dict["state"].get(key)):
                continue
            if is_dtensor(param):
                raise ValueError(
                    f"the state of parameter {key} (shape {list(param.shape)}) is sharded (a DTensor): load the full "
                    "state dict into an optimizer of whole parameters, and convert that"
                )
            check_complete(key, param, state, chain.from_iterable(ours for _, ours in slots))
            states[key] = _write_state(storage, slots, state)
    return {"state": states, "param_groups": groups}


def _storage(optimizer: StatefulOptimizer) -> _Storage:
    for storage in _COUNTERPARTS:
        if storage.rule.name == optimizer._rules[0].name:
            return storage
    raise ValueError(f"{type(optimizer).__name__} has no counterpart in bitsandbytes to exchange state dicts with")


def _slots(optimizer: StatefulOptimizer, group: dict[str, Any]) -> _Slots:
    """Of three states, the first two are stacked."""
    names = optimizer._rule(group).state_names
    return [(1, names[:-1] or names), (2, names[-1:])][: len(names)]


def _read_group(optimizer: StatefulOptimizer, storage: _Storage, i: int, group: _Group, saved: _Group) -> _Group:
    """Our group with the saved options, and whatever else a user or a scheduler put into the saved group."""
    here, schedule = f"param group {i} of the bitsandbytes state dict", storage.betas.count("betas") == 3
    ours = type(optimizer).__name__
    if missing := {"lr", "betas", "eps", "weight_decay"} - saved.keys():
        raise ValueError(f"{here} lacks {sorted(missing)}")
    betas, eps = tuple(saved["betas"]), saved["eps"]
    if not _plausible(storage, betas, eps) or (schedule and not saved.keys() >= _SCHEDULE):
        raise ValueError(f"{here} has betas={betas}, eps={eps}; is it of another optimizer than {ours}?")
    for k, key in enumerate(storage.betas):
        if isinstance(key, str) and key in storage.ignored and betas[k] != storage.ignored[key]:
            raise ValueError(
                f"{here} has betas={betas}, but bitsandbytes ignores {key}={betas[k]}: set betas[{k}] to "
                f"{storage.ignored[key]} to go on as it did (or is it of another optimizer than {ours}?)"
            )
    options = {"lr": saved["lr"], "weight_decay": saved["weight_decay"]} | ({"eps": eps} if storage.eps else {})
    if "betas" in storage.betas:
        options["betas"] = betas
    else:
        options |= {key: beta for key, beta in zip(storage.betas, betas, strict=True) if isinstance(key, str)}
    if schedule:
        options |= {key: saved[key] for key in _SCHEDULE}
    extra = saved.keys() - _GROUP_KEYS - optimizer.defaults.keys()
    return {**group, **{key: saved[key] for key in extra}, **options, "params": saved["params"]}


def _plausible(storage: _Storage, betas: tuple[float, ...], eps: float) -> bool:
    """Whether a group can be of the rule's optimizer: bitsandbytes' state dicts do not say which one they are of."""
    if len(betas) != len(storage.betas) or (storage.nonzero is not None and betas[storage.nonzero] == 0):
        return False
    if any(beta != key for key, beta in zip(storage.betas, betas, strict=True) if not isinstance(key, str)):
        return False
    return len(storage.rule.states) > 1 or (eps != 0) == storage.eps


def _write_group(optimizer: StatefulOptimizer, storage: _Storage, i: int, group: _Group, ids: list[int]) -> _Group:
    theirs = f"bitsandbytes' {type(optimizer).__name__}"
    for key, value in {**storage.ignored, "maximize": False}.items():
        if group[key] != value:
            raise ValueError(
                f"param group {i} has {key}={group[key]}; {theirs} would go on with {key}={value}, whatever it is told"
            )
    if "betas" in storage.betas:
        betas = tuple(group["betas"])
    else:
        betas = tuple(group[key] if isinstance(key, str) else key for key in storage.betas)
    if storage.nonzero == 0 and not betas[0]:
        raise ValueError(f"param group {i} has {storage.betas[0]}=0, which {theirs} refuses")
    written = {"lr": float(group["lr"]), "betas": betas, "weight_decay": group["weight_decay"]}
    written["eps"] = group["eps"] if storage.eps else 0.0
    if len(storage.rule.states) > 1:  # Adam and LAMB have AdEMAMix's keys, too
        written |= {"alpha": group.get("alpha", 0.0), "t_alpha": group.get("t_alpha"), "t_beta3": group.get("t_beta3")}
    extra = group.keys() - optimizer.defaults.keys() - _GROUP_KEYS
    return {**written, "params": ids, **{key: group[key] for key in extra}}


def _state_problem(storage: _Storage, slots: _Slots, param: Tensor, group: _Group, state: dict[str, Any]) -> str | None:
    """What is wrong with a state of bitsandbytes (not nested any more), or None."""
    if "max1" in state:
        return "one scale for the whole of it (block_wise=False; LAMB8bit and LARS8bit before 0.50) cannot be read"
    quantized = any(f"absmax{number}" in state for number, _ in slots)
    kinds = ("state", "qmap", "absmax") if quantized else ("state",)
    needed = {"step", *(f"{kind}{number}" for number, _ in slots for kind in kinds)}
    if storage.keeps_unorm and group["max_unorm"]:
        needed.add("unorm_vec")
    known = needed | {"gnorm_vec"} | ({"unorm_vec"} if storage.keeps_unorm else set())
    missing, extra = sorted(needed - state.keys()), sorted(state.keys() - known)
    if missing or extra:
        return f"keys missing: {missing}, unexpected: {extra}; is it of another optimizer?"
    step = state["step"]
    if not isinstance(step, int) and not (isinstance(step, Tensor) and step.numel() == 1 and step == step.long()):
        return f"its step is {step!r}, expected an int"
    if step < 0:
        return f"its step is negative, {int(step)}"
    return next(filter(None, (_slot_problem(number, ours, param, state) for number, ours in slots)), None)


def _map(name: str) -> Tensor:
    """What bitsandbytes takes the codes of a state for; our decoding leaves it by 4 ulp at most."""
    return create_dynamic_map(STATES[name].role.signed)


def _slot_problem(number: int, ours: tuple[str, ...], param: Tensor, state: dict[str, Any]) -> str | None:
    quantized, stack = f"absmax{number}" in state, (len(ours),) if len(ours) > 1 else ()
    qmap = _map(ours[0])
    wanted = {f"state{number}": (codec.dtype_of(codec.BITSANDBYTES if quantized else UNCODED), (*stack, *param.shape))}
    if quantized:
        wanted[f"absmax{number}"] = (torch.float32, (*stack, *codec.flat_absmax_shape(param.shape)))
        wanted[f"qmap{number}"] = (torch.float32, qmap.shape)
    for key, (dtype, shape) in wanted.items():
        tensor = state[key]
        if not isinstance(tensor, Tensor):
            return f"'{key}' is not a tensor"
        if tensor.dtype != dtype or tensor.shape != shape:
            return f"'{key}' is {tensor.dtype} of shape {list(tensor.shape)}, expected {dtype} of shape {list(shape)}"
        if not tensor.is_contiguous():
            return (
                f"'{key}' has strides {tensor.stride()}; bitsandbytes numbers its elements by their place in memory on "
                "a GPU, by their index on a CPU: make it contiguous in the order of the device that wrote it"
            )
    # The last bits of torch.linspace, which bitsandbytes makes its maps with, are not the same on all machines.
    if quantized and not torch.allclose(state[f"qmap{number}"].cpu(), qmap, rtol=1e-6, atol=0):
        return f"'qmap{number}' is not the dynamic map, the only codebook of the optimizers here"
    return None


def _read_state(slots: _Slots, param: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
    read = {"step": torch.tensor(float(state["step"]), dtype=torch.float32, device="cpu")}
    read |= {key: state[key] for key in state.keys() & {"gnorm_vec"}}
    whole_rows = param.dim() >= 2 and math.prod(param.shape[1:]) % STATE_BLOCK == 0
    blocks = codec.absmax_shape(param.shape) if whole_rows else codec.flat_absmax_shape(param.shape)
    for number, ours in slots:
        read |= zip(ours, state[f"state{number}"].view(len(ours), *param.shape), strict=True)
        if f"absmax{number}" in state:
            scales = state[f"absmax{number}"].view(len(ours), *blocks)
            read |= zip(map(codec.absmax_name, ours), scales, strict=True)
    return read


def _write_state(storage: _Storage, slots: _Slots, state: dict[str, Tensor]) -> dict[str, Any]:
    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0]

    device, quantized = (
        state["step"].device,
        all(codec.codec_of(state, x) == codec.BITSANDBYTES for _, ours in slots for x in ours),
    )
    written = {key: state[key] for key in state.keys() & {"gnorm_vec"}}
    for number, ours in slots:
        if quantized:
            codes, scales = zip(*(_flat(state, name) for name in ours), strict=True)
            qmap = _map(ours[0]).to(device)
            written |= {f"state{number}": joined(codes), f"qmap{number}": qmap, f"absmax{number}": joined(scales)}
        else:
            written[f"state{number}"] = joined([codec.decoded(state, name) for name in ours])
    if storage.keeps_unorm:
        written["unorm_vec"] = torch.zeros(1, dtype=torch.float32, device=device)
    return {"step": int(state["step"].item()), _NESTED: written}


def _flat(state: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """An 8-bit state in flat blocks."""
    codes, absmax = state[name], state[codec.absmax_name(name)]
    if absmax.dim() == 1 or math.prod(codes.shape[1:]) % STATE_BLOCK == 0:
        return codes, absmax.reshape(-1)
    return codec.encoded(name, codec.decoded(state, name), codec.BITSANDBYTES, flat=True)

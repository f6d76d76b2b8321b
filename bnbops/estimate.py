"""How many bytes training needs for weights, gradients and optimizer states, told without allocating them."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from bnbops import optim
from bnbops.facts import FLOATS, STATE_BLOCK, name_of
from bnbops.optim.core.codec import scale_keys
from bnbops.optim.core.manager import GlobalOptimManager
from bnbops.optim.core.state import PER_PARAMETER, cuts_between_blocks

LARGEST = 10**18  # number of parameters: torch counts bytes in 64 bits

_MANAGER = GlobalOptimManager.get_instance()


@dataclass(frozen=True)
class Bytes:
    """Bytes by purpose. `steps` are step counts, and the history of norms if percentile clipping is on."""

    weights: int
    grads: int
    states: int
    scales: int
    steps: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """What training `parameters` elements needs with the class named: in all, and on the largest of `shards` ranks."""

    optimizer: str
    parameters: int
    shards: int
    whole: Bytes
    per_rank: Bytes


def optimizers() -> dict[str, type[optim.Optimizer]]:
    """The classes of `bnbops.optim` by name."""
    public = {name: getattr(optim, name) for name in optim.__all__}
    return {name: value for name, value in public.items() if _is_optimizer(value)}


def _is_optimizer(value: Any) -> TypeGuard[type[optim.Optimizer]]:
    return inspect.isclass(value) and issubclass(value, optim.Optimizer) and value is not optim.Optimizer


def estimate(
    model: nn.Module | float,
    optimizer: str | type[optim.Optimizer],
    *,
    dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    shards: int = 1,
    **options: Any,
) -> Estimate:
    """Bytes for the parameters of a model, their gradients and the optimizer's states.

    The optimizer itself decides: it is built over parameters without storage, and so are its states. Shared parameters
    count once, frozen ones have neither gradient nor state. What `GlobalOptimManager` overrides for the module's
    parameters holds. Buffers and activations are not counted.

    Args:
        model: a module, on the meta device if it is large; or a number of parameters, which are taken for large
            matrices with rows of a multiple of 256 elements (a remainder for a vector).
        optimizer: a class of `bnbops.optim`, or its name in any case.
        dtype: of the floating-point weights; the module's own by default, float32 for a number of parameters.
        grad_dtype: of the gradients; the weights' own by default. float32 is the other one that the optimizers take.
        shards: ranks that every parameter is sharded over by its rows, as FSDP2 does; step counts are replicated.
            Vectors of which a rank would have parts of blocks have 32-bit states then.
        options: arguments of the optimizer that change its states, such as `momentum` or `min_8bit_size`.

    Raises:
        ValueError: an unknown optimizer, or a number or dtype that makes no sense.
        TypeError: an option that the optimizer does not have.
    """
    cls = _find(optimizer)
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
        raise ValueError(f"shards must be a positive whole number, got {shards!r}")
    params = _of_module(model, dtype) if isinstance(model, nn.Module) else _of_count(model, dtype)
    grad_dtypes = {param: _grad_dtype(param, grad_dtype) for param in params if param.requires_grad}

    def count(ranks: int) -> Bytes:
        def local(tensor: Tensor) -> int:
            """Elements of the first rank's part under Shard(0), the largest; what has no dimensions is replicated."""
            return math.prod([-(tensor.shape[0] // -ranks), *tensor.shape[1:]]) if tensor.dim() else 1

        kinds = {"states": 0, "scales": 0, "steps": 0}
        for state in _states(cls, params, options, ranks):
            scales = scale_keys(state)
            for key, tensor in state.items():
                kind = "steps" if key in PER_PARAMETER else "scales" if key in scales else "states"
                kinds[kind] += tensor.nbytes if kind == "steps" else local(tensor) * tensor.itemsize
        weights = sum(local(param) * param.itemsize for param in params)
        return Bytes(weights, sum(local(param) * dtype.itemsize for param, dtype in grad_dtypes.items()), **kinds)

    elements = sum(param.numel() for param in params)
    return Estimate(cls.__name__, elements, shards, whole=count(1), per_rank=count(shards))


def _find(optimizer: str | type[optim.Optimizer]) -> type[optim.Optimizer]:
    if _is_optimizer(optimizer):
        return optimizer
    known = optimizers()
    by_name = {name.lower(): cls for name, cls in known.items()}
    if not isinstance(optimizer, str) or optimizer.lower() not in by_name:
        raise ValueError(f"unknown optimizer {optimizer!r}; bnbops.optim has {', '.join(known)}")
    return by_name[optimizer.lower()]


def _of_module(module: nn.Module, dtype: torch.dtype | None) -> list[nn.Parameter]:
    params, overrides = [], _MANAGER.overrides()
    for original in module.parameters():
        cast_to = dtype if dtype is not None and original.is_floating_point() else original.dtype
        param = _parameter(original.shape, cast_to, original.requires_grad)
        if original in overrides:
            _MANAGER.override_config(param, key_value_dict=overrides[original])
        params.append(param)
    if not params:
        raise ValueError(f"{type(module).__name__} has no parameters")
    return params


def _of_count(count: float, dtype: torch.dtype | None) -> list[nn.Parameter]:
    number = isinstance(count, int | float) and not isinstance(count, bool)
    if not number or not 1 <= count <= LARGEST or count % 1:
        raise ValueError(f"expected a module or a whole number of parameters from 1 to {LARGEST:.0e}, got {count!r}")
    rows, rest = divmod(int(count), STATE_BLOCK)
    shapes = [(rows, STATE_BLOCK)] * (rows > 0) + [(rest,)] * (rest > 0)
    return [_parameter(shape, dtype or torch.float32, True) for shape in shapes]


def _parameter(shape: Iterable[int], dtype: torch.dtype, trainable: bool) -> nn.Parameter:
    if trainable and dtype not in FLOATS:
        raise ValueError(f"the optimizers take parameters of {', '.join(map(name_of, FLOATS))}, not {name_of(dtype)}")
    return nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device="meta"), requires_grad=trainable)


def _grad_dtype(param: Tensor, grad_dtype: torch.dtype | None) -> torch.dtype:
    possible = dict.fromkeys([param.dtype, torch.float32])
    if grad_dtype is None or grad_dtype in possible:
        return grad_dtype or param.dtype
    taken = " or ".join(map(name_of, possible))
    raise ValueError(f"gradients of {name_of(param.dtype)} parameters are {taken}, not {name_of(grad_dtype)}")


def _states(
    cls: type[optim.Optimizer], params: list[nn.Parameter], options: dict[str, Any], ranks: int
) -> list[dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it does not matter where they would be
        _MANAGER.override_config(params, "is_paged", False)  # in files they are as large, but this needs no files
        cut = [p for p in params if p.dim() == 1 and ranks > 1 and not cuts_between_blocks(p.shape, ranks)]
        _MANAGER.override_config(cut, "optim_bits", 32)
        optimizer = cls(params, **{"lr": 1e-3, **options})
    optimizer.init_state()
    return list(optimizer.state.values())

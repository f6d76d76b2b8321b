"""The operators on DTensors: which placements each takes, and what every rank computes on its own part.

Activations are redistributed where a product needs them otherwise, as torch's own products do. Weights and their scales
are not: they stay where they are, or the call is refused. All ranks see the same shapes and placements, so all of them
refuse alike.

Rules belong to `torch.library.register_torch_dispatch` rather than to DTensor's `register_sharding`: a rank's part of a
4-bit weight needs a `shape` of its own, and `register_sharding` passes numbers on as they came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from bnbops.dtensors import distributed, redistributed

Arguments = dict[str, Any]
Rule = Callable[[OpOverload, Arguments], Any]


def _refuse(op: OpOverload, problem: str) -> NoReturn:
    raise RuntimeError(f"{op.name()}: {problem}")


# ---- arguments and results -------------------------------------------------------------------------------------


def _placements(op: OpOverload, name: str, tensor: Tensor, mesh: DeviceMesh) -> tuple[Placement, ...]:
    """Where a tensor's parts are; a plain tensor counts as replicated."""
    if not isinstance(tensor, DTensor):
        return (Replicate(),) * mesh.ndim
    if tensor.device_mesh != mesh:
        _refuse(op, f"{name} is on {tensor.device_mesh}, other arguments on {mesh}; all DTensors need the same mesh")
    return tensor.placements


def _mesh(arguments: Arguments) -> DeviceMesh:
    return next(value.device_mesh for value in arguments.values() if isinstance(value, DTensor))


def _local(arguments: Arguments) -> Arguments:
    """The arguments with this rank's part of every DTensor."""
    return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in arguments.items()}


def _check_alike(
    op: OpOverload, arguments: Arguments, names: Sequence[str], like: str, placements: tuple[Placement, ...]
) -> None:
    """Refuses scales that are placed otherwise than the codes that they belong to."""
    for name in names:
        tensor = arguments.get(name)
        if tensor is not None and _placements(op, name, tensor, _mesh(arguments)) != placements:
            found = list(tensor.placements) if isinstance(tensor, DTensor) else "a plain tensor"
            _refuse(op, f"{name} must be placed as {like} is, {list(placements)}, got {found}")


def _whole(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Parts with equally many rows as a DTensor."""
    parts, shape = _parts(mesh, placements), tensor.shape
    return distributed(tensor, mesh, placements, (shape[0] * parts, *shape[1:]) if parts > 1 else shape)


def _parts(mesh: DeviceMesh, placements: Sequence[Placement]) -> int:
    """Into how many parts a tensor is cut."""
    return math.prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_shard())


def _check_flat(
    op: OpOverload, name: str, shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement], block: int
) -> None:
    """Refuses a tensor with flat blocks unless each rank has as many rows as every other, and whole blocks."""
    if any(placement not in (Replicate(), Shard(0)) for placement in placements):
        _refuse(op, f"{name} may be Replicate or Shard(0) on each dimension of the mesh, got {list(placements)}")
    parts = _parts(mesh, placements)
    if parts > 1 and (shape[0] % parts or math.prod(shape) // parts % block):
        _refuse(
            op,
            f"{name} of shape {list(shape)} has blocks of {block} elements that {parts} ranks cannot share: each needs "
            "as many rows as the others and whole blocks; replicate it, or quantize each rank's part by itself",
        )


# ---- 8-bit blocks ----------------------------------------------------------------------------------------------


def _quantize(op: OpOverload, arguments: Arguments) -> tuple[DTensor, DTensor]:
    A, blocksize, mesh = arguments["A"], arguments["blocksize"], _mesh(arguments)
    placements = _placements(op, "A", A, mesh)
    _check_flat(op, "A", A.shape, mesh, placements, blocksize)
    codes, absmax = op(**_local(arguments))
    return _whole(codes, mesh, placements), _whole(absmax, mesh, placements)


def _dequantize_blockwise(op: OpOverload, arguments: Arguments) -> DTensor:
    A, mesh = arguments["A"], _mesh(arguments)
    placements = _placements(op, "A", A, mesh)
    _check_flat(op, "A", A.shape, mesh, placements, arguments["blocksize"])
    _check_alike(op, arguments, ["absmax"], "A", placements)
    return distributed(op(**_local(arguments)), mesh, placements, A.shape)


# ---- quantized weights -----------------------------------------------------------------------------------------


@dataclass
class _Weight:
    """A rank's part of a weight."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]  # of the weight's matrix: Replicate, Shard(0) or Shard(1)
    shape: tuple[int, ...]  # global
    arguments: Arguments  # the operator's, for the part


def _weight_4bit(op: OpOverload, arguments: Arguments, name: str = "weight") -> _Weight:
    """The 4-bit weight among an operator's arguments."""
    mesh, shape = _mesh(arguments), tuple(arguments["shape"])
    placements = _placements(op, name, arguments[name], mesh)
    _check_alike(op, arguments, ["absmax", "nested_absmax"], name, placements)
    if all(placement.is_replicate() for placement in placements):
        local_shape = list(shape)
    else:
        local_shape = _local_shape(op, arguments, name, placements)
    return _Weight(mesh, placements, shape, _local(arguments) | {"shape": local_shape})


def _local_shape(op: OpOverload, arguments: Arguments, name: str, placements: tuple[Placement, ...]) -> list[int]:
    """The shape of this rank's part of a 4-bit weight. Refuses parts without whole blocks."""
    mesh, codes, blocksize, shape = _mesh(arguments), arguments[name], arguments["blocksize"], list(arguments["shape"])
    in_rows = len(shape) == 2 and codes.shape[0] == arguments["absmax"].shape[0] == shape[0]
    if any(placement not in (Replicate(), Shard(0), *[Shard(1)] * in_rows) for placement in placements):
        _refuse(op, f"{name} may be Replicate, Shard(0) or, a matrix in rows, Shard(1), got {list(placements)}")
    rows, columns = ([p if p == Shard(dim) else Replicate() for p in placements] for dim in (0, 1))
    if not in_rows or shape[1] % blocksize:
        _check_flat(op, name, shape, mesh, rows, blocksize)
    local_shape, cut, local = list(shape), _parts(mesh, columns), codes.to_local()
    if cut > 1:
        if shape[1] % (cut * blocksize):
            _refuse(op, f"{name} has rows of {shape[1]}, which {cut} ranks cannot share in blocks of {blocksize}")
        local_shape[1] = shape[1] // cut
    local_shape[0] = local.numel() * local.element_size() * 2 // math.prod(local_shape[1:])
    blocks, per_scale = math.prod(local_shape) // blocksize, arguments.get("nested_blocksize", 256)
    nested = arguments.get("nested_absmax") is not None
    if nested and (shape[0] % _parts(mesh, placements) or blocks % per_scale):
        _refuse(op, f"ranks share the blocks of {per_scale} scales of {name}; replicate it or quantize it singly")
    return local_shape


def _weight_int8(op: OpOverload, arguments: Arguments) -> _Weight:
    """The 8-bit weight among an operator's arguments, with a scale for each row."""
    mesh, weight = _mesh(arguments), arguments["weight"]
    placements = _placements(op, "weight", weight, mesh)
    if any(placement not in (Replicate(), Shard(0)) for placement in placements):
        _refuse(op, f"weight may be Replicate or Shard(0), since a row has one scale, got {list(placements)}")
    _check_alike(op, arguments, ["scale"], "weight", placements)
    return _Weight(mesh, placements, tuple(weight.shape), _local(arguments))


def _dequantize_4bit(op: OpOverload, arguments: Arguments) -> DTensor:
    weight = _weight_4bit(op, arguments, "A")
    return distributed(op(**weight.arguments), weight.mesh, weight.placements, weight.shape)


def _product(
    op: OpOverload, arguments: Arguments, weight_of: Callable[[OpOverload, Arguments], _Weight], name: str = "x"
) -> DTensor:
    """`name` times a weight: "x", which is summed over the weight's columns, or "grad", over its rows."""
    weight, contracted = weight_of(op, arguments), 1 if name == "x" else 0
    x, bias, last = arguments[name], arguments.get("bias"), arguments[name].dim() - 1

    def placed(mine: Placement, placement: Placement) -> tuple[Placement, Placement, Placement]:
        """Of x, the result and the bias, where x is `mine` and the weight has `placement`."""
        if placement == Shard(contracted):
            return Shard(last), Partial(), Replicate()
        if placement.is_shard():
            return Replicate(), Shard(last), Shard(0)
        batch = mine if isinstance(mine, Shard) and mine.dim != last else Replicate()
        return batch, batch, Replicate()

    both = zip(_placements(op, name, x, weight.mesh), weight.placements, strict=True)
    wanted, given, biased = zip(*(placed(*pair) for pair in both), strict=True)
    local = weight.arguments | {name: redistributed(x, weight.mesh, wanted).to_local()}
    if bias is not None:
        bias = redistributed(bias, weight.mesh, biased).to_local()
        adds = all(weight.mesh.get_local_rank(i) == 0 for i, placement in enumerate(given) if placement.is_partial())
        local["bias"] = bias if adds else None  # once among the parts of a sum
    shape = (*x.shape[:-1], weight.shape[1 - contracted])
    return distributed(op(**local), weight.mesh, given, shape)


def _linear_int8(op: OpOverload, arguments: Arguments) -> DTensor:
    x, mesh = arguments["x"], _mesh(arguments)
    if arguments["threshold"] > 0 and any(p.is_shard() for p in _placements(op, "x", x, mesh)):
        _refuse(op, "with a threshold, outlier columns are those of all rows of x: replicate x, or use threshold=0")
    return _product(op, arguments, _weight_int8)


def _embedding_4bit(op: OpOverload, arguments: Arguments) -> DTensor:
    weight, indices = _weight_4bit(op, arguments), arguments["indices"]
    wanted: list[Placement] = []  # of indices
    given: list[Placement] = []
    for mine, placement in zip(_placements(op, "indices", indices, weight.mesh), weight.placements, strict=True):
        wanted.append(mine if placement.is_replicate() and mine.is_shard() else Replicate())
        by_placement = {Shard(0): Partial(), Shard(1): Shard(indices.dim())}
        given.append(by_placement.get(placement, wanted[-1]))
    indices = redistributed(indices, weight.mesh, wanted).to_local()
    if Shard(0) in weight.placements:
        rows = _rows_of(op, weight, indices)
    else:
        rows = op(**weight.arguments | {"indices": indices})
    return distributed(rows, weight.mesh, given, (*arguments["indices"].shape, weight.shape[1]))


def _rows_of(op: OpOverload, weight: _Weight, indices: Tensor) -> Tensor:
    """The rows that this rank has, zeros for the others: their sum over the ranks has each row once."""
    mesh, shape = weight.mesh, (*indices.shape, weight.arguments["shape"][1])
    numbers = torch.arange(weight.shape[0], dtype=torch.int64, device=indices.device)
    own = DTensor.from_local(numbers, mesh, run_check=False)
    own = own.redistribute(placements=[p if p == Shard(0) else Replicate() for p in weight.placements]).to_local()
    if len(own) == 0:
        return torch.zeros(shape, dtype=weight.arguments["dtype"], device=indices.device)
    inside = (indices >= own[0]) & (indices <= own[-1])
    rows = op(**weight.arguments | {"indices": torch.where(inside, indices - own[0], 0)})
    return rows.masked_fill(~inside.unsqueeze(-1), 0)


# ---- registration ----------------------------------------------------------------------------------------------


def _none(op: OpOverload, arguments: Arguments) -> NoReturn:
    raise NotImplementedError(f"{op.name()} does not take DTensors; call it on their local parts (to_local())")


RULES: dict[str, Rule] = {
    "quantize_blockwise": _quantize,
    "dequantize_blockwise": _dequantize_blockwise,
    "quantize_4bit": _quantize,
    "dequantize_4bit": _dequantize_4bit,
    "embedding_4bit": _embedding_4bit,
    "linear_4bit": partial(_product, weight_of=_weight_4bit),
    "linear_4bit_input_grad": partial(_product, weight_of=_weight_4bit, name="grad"),
    "linear_int8": _linear_int8,
    "linear_int8_weight_only": partial(_product, weight_of=_weight_int8),
    "linear_int8_input_grad": partial(_product, weight_of=_weight_int8, name="grad"),
}


def _registered(rule: Rule) -> Callable[..., Any]:
    def dispatch(cls: type, op: OpOverload, types: Any, args: Sequence[Any], kwargs: Arguments | None = None) -> Any:
        names = (argument.name for argument in op._schema.arguments)
        return rule(op, dict(zip(names, args, strict=False)) | (kwargs or {}))

    return dispatch


def register() -> None:
    """Gives every operator its rule for DTensors, or one that says there is none."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, op = name.partition("::")
        if namespace == "bnbops":
            torch.library.register_torch_dispatch(name, DTensor, _registered(RULES.get(op, _none)))

"""What torch's functions make of a parameter that holds codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._ops import OperatorBase
from torch.nn import functional as F
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from bnbops.tracing import is_compiling
from bnbops.versions import torch_is

# A context in which torch's functions take a quantized parameter for the plain tensor of its codes.
codes_as_they_are = torch._C.DisableTorchFunctionSubclass

# What computes with a weight that it is handed, and means the weight's values.
_COMPUTING = {
    *(F.linear, F.bilinear, F.embedding, F.embedding_bag, torch.embedding, torch.embedding_bag),
    F.multi_head_attention_forward,
}
# The rest goes by names: in-place functions, operators and aliases come in many.
_PRODUCTS = ("mul", "rmul", "multiply", "div", "rdiv", "divide", "true_divide", "truediv", "rtruediv")
_READING = ("add", "radd", "sub", "rsub", "subtract", "lerp", "norm_except_dim", "_weight_norm", *_PRODUCTS)
_COPYING = ("copy_", "__setitem__")
_NOT_WRITING = ("detach_", "requires_grad_", "share_memory_", "resize_", "resize_as_", *_COPYING)
_FAKE = _TorchDispatchModeKey.FAKE
_FAKES_KNOW_CODES = torch_is("2.13")
_SET_DATA = torch.Tensor.data.__set__
_SET_REQUIRES_GRAD = torch.Tensor.requires_grad.__set__


class CodesParameter(nn.Parameter):
    """A parameter whose data are, or will be, the codes of a quantized weight.

    For torch's functions it is the tensor of its codes, as in bitsandbytes, with two exceptions. What computes with a
    weight (`F.linear`, `F.embedding`, attention) gets the floats that the codes stand for. What would take codes for
    values, and so make nonsense of the weight without a word, is refused: `torch.nn.init`, arithmetic, floats that are
    to be copied over codes, parametrizations.

    That there is a `__torch_function__` also tells torch's own modules that their fused kernels, such as that of
    `nn.TransformerEncoderLayer`, cannot take this weight.

    A kind of weights defines `_holds_codes`, and `_values(dtype)`: what the codes stand for, in `dtype`, or for None in
    the one that the weight is known to have had.
    """

    _values_by = ""  # the call that gives the values, for messages
    _scaled = False  # whether codes times their scales are the values
    _holds_codes: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        with codes_as_they_are():
            if func in _COMPUTING:
                args, kwargs = _with_values(args, kwargs)
            elif not is_compiling():
                _refuse_writing(func, args, kwargs)
                _refuse_reading(func, args)
            if not torch.compiler.is_dynamo_compiling() and _is_faked(func):
                args, kwargs = tree_map_only(CodesParameter, _plain, (args, kwargs))
            return func(*args, **kwargs)


def _holds_codes(value: Any) -> bool:
    return isinstance(value, CodesParameter) and value._holds_codes


def _is_faked(func: Any) -> bool:
    """Whether the result is to be a fake tensor, as when the program of `torch.export` is compiled, but fake tensors
    know no parameters of other classes yet."""
    return not _FAKES_KNOW_CODES and isinstance(func, OperatorBase) and _get_dispatch_mode(_FAKE) is not None


def _plain(weight: CodesParameter) -> Tensor:
    with no_dispatch():
        return weight.data


def _with_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with values in the place of codes, in the dtype of the activations."""
    others = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and not _holds_codes(each)]
    dtype = next((each.dtype for each in others if each.is_floating_point()), None)
    return tree_map(lambda each: each._values(dtype) if _holds_codes(each) else each, (args, kwargs))


def _refuse_writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    weight = kwargs.get("out", kwargs.get("tensor", args[0] if args else None))  # `tensor`: of torch.nn.init
    if not _holds_codes(weight):
        return
    if func == _SET_REQUIRES_GRAD or name == "requires_grad_":
        if kwargs.get("requires_grad", args[1] if args[1:] else True):
            raise RuntimeError(
                f"{_described(weight)} cannot be trained: leave its requires_grad False, and train parameters that are "
                "floats, or adapters"
            )
    elif name in _COPYING or func == _SET_DATA:
        if not isinstance(args[-1], Tensor) or args[-1].dtype != weight.dtype:
            raise RuntimeError(_refusal(weight, "an assignment" if name.startswith("__set") else name))
    elif (name.endswith("_") and not name.startswith("_") and name not in _NOT_WRITING) or "out" in kwargs:
        raise RuntimeError(_refusal(weight, name))


def check_name(name: str, param: nn.Parameter | None) -> None:
    """Refuses a quantized module's weight by another name, from which pruning, for one, would compute the weight."""
    if name != "weight" and _holds_codes(param):
        raise RuntimeError(
            f"{_described(param)} cannot be registered as {name}, for the weight to be computed from it: prune or "
            "parametrize before quantization"
        )


def _refusal(weight: CodesParameter, what: str) -> str:
    return (
        f"{_described(weight)} holds codes, which {what} would overwrite: load a state dict into its module, or give "
        "the module another weight; parametrizations and pruning come before quantization"
    )


def _refuse_reading(func: Any, args: tuple[Any, ...]) -> None:
    """Codes that are numbers, times float scales, are values; other arithmetic with codes means nothing."""
    name = getattr(func, "__name__", "").strip("_")
    if name not in _READING or (weight := next((each for each in args if _holds_codes(each)), None)) is None:
        return
    integers = any(isinstance(each, Tensor) and each is not weight and not each.is_floating_point() for each in args)
    if not weight._scaled or name not in _PRODUCTS or integers:
        raise RuntimeError(
            f"{_described(weight)} holds codes, which {name} would take for values: get the values by "
            f"{weight._values_by}, or the codes by weight.data"
        )


def _described(weight: CodesParameter) -> str:
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"this quantized weight ({type(weight).__name__}, {dtype} {list(weight.shape)})"

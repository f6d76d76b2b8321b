"""What `quantize_` converts of a model, what it leaves, and why: decided before anything changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bnbops.dtensors import is_dtensor
from bnbops.facts import FORMATS_4BIT
from bnbops.nn.four_bit.module import Weight4bit
from bnbops.nn.int8.module import Int8Module

FORMATS = (*FORMATS_4BIT, "int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights that can be quantized
SHARDED = "its weight is sharded (a DTensor): quantize the model first, then call fully_shard"

_CONV1D = ("transformers.pytorch_utils", "Conv1D")

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]
Rule = Callable[["Place"], str | None]  # the reason to leave a weight


class Place(NamedTuple):
    """Where a tensor is registered; a shared one has several places."""

    path: str  # of the module
    module: nn.Module
    attribute: str

    @property
    def name(self) -> str:
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def tensor(self) -> Tensor | None:
        return self.module._parameters.get(self.attribute)

    @property
    def kind(self) -> str | None:
        """What `quantize_` may take the tensor for."""
        if self.attribute == "weight" and (isinstance(self.module, nn.Linear) or is_conv1d(self.module)):
            return "linear"
        if self.attribute == "weight" and isinstance(self.module, nn.Embedding):
            return "embedding"
        # Only the name tells experts [E, out, in] from other 3-D parameters (convolutions, positions [1, time, width]).
        named = "expert" in f"{self.name} {type(self.module).__name__}".lower()
        own = not type(self.module).__module__.startswith("torch.nn.modules.")
        three = isinstance(self.tensor, Tensor) and self.tensor.ndim == 3 and self.tensor.is_floating_point()
        return "expert" if named and own and three else None

    @property
    def transposed(self) -> bool:
        """Whether it is `[in, out]`; linear layers hold `[out, in]`."""
        return self.kind == "linear" and is_conv1d(self.module)

    @property
    def subject(self) -> str:
        """What is converted: the module, or the expert parameter alone."""
        return self.name if self.kind == "expert" else self.path


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Transformers' linear layer of GPT-2, whose weight is transposed."""
    return any((base.__module__, base.__qualname__) == _CONV1D for base in type(module).__mro__)


@dataclass(frozen=True)
class QuantizationPlan:
    """What `bnbops.nn.quantize_` does with a model; `print` shows it as a table.

    Attributes:
        convert: names of modules, and of expert parameters, each with the class that it becomes.
        leave: names of linear layers (and of embeddings and expert parameters, if they were asked for) that keep their
            floats, each with the reason.
        unasked: those of `leave` that are left for another reason than `skip`, its default, or being quantized already.
    """

    convert: dict[str, str]
    leave: dict[str, str]
    unasked: tuple[str, ...]

    def __str__(self) -> str:
        rows = {name: f"becomes {kind}" for name, kind in self.convert.items()}
        rows |= {name: f"is left: {reason}" for name, reason in self.leave.items()}
        width = max(map(len, rows), default=0)
        return "\n".join(f"{name:{width}}  {text}" for name, text in rows.items())


def quantization_plan(
    model: nn.Module,
    quant: str = "nf4",
    *,
    skip: Skip | None = None,
    embeddings: bool = False,
    experts: bool = True,
) -> QuantizationPlan:
    """What `bnbops.nn.quantize_` would convert, and what it would leave and why.

    Arguments and errors: as `bnbops.nn.quantize_`.
    """
    check_model(model, quant)
    return plan_by_rule(model, quant, skip_rule(model, skip), embeddings, experts)


def plan_by_rule(model: nn.Module, quant: str, asked: Rule, embeddings: bool, experts: bool) -> QuantizationPlan:
    """As `quantization_plan`; `asked` has the reasons why weights are to be left."""
    kinds = {"linear", *(["embedding"] if embeddings else []), *(["expert"] if experts else [])}
    candidates = [place for place in _places(model) if place.kind in kinds]
    obstacles = {place: asked(place) or _obstacle(place, quant) for place in candidates}
    shared = places_by_tensor(model)

    convert: dict[str, str] = {}
    leave: dict[str, str] = {}
    for place in candidates:
        tensor = place.tensor
        others = [] if tensor is None else [other for other in shared[memory_of(tensor)] if other != place]
        tied = next(
            (other for other in others if obstacles.get(other, "") is not None or not _fits(other, place)), None
        )
        if (reason := obstacles[place]) is not None:
            leave[place.subject] = reason
        elif tied is not None:
            leave[place.subject] = f"shares its weight with {tied.subject if tied.kind else tied.name}"
        else:
            convert[place.subject] = _class_name(place, quant)
    expected = {place.subject for place in candidates if asked(place) or _is_quantized(place.module)}
    return QuantizationPlan(convert, leave, tuple(name for name in leave if name not in expected))


def places_by_tensor(model: nn.Module) -> dict[object, list[Place]]:
    """All places of each parameter."""
    places: dict[object, list[Place]] = defaultdict(list)
    for place in _places(model):
        if place.tensor is not None:
            places[memory_of(place.tensor)].append(place)
    return places


def memory_of(tensor: Tensor) -> object:
    """The same for parameters that are one, or that begin at the same place in memory."""
    if type(tensor) is not nn.Parameter or tensor.numel() == 0:
        return id(tensor)
    if tensor.is_meta:
        return tensor.untyped_storage()._cdata, tensor.storage_offset()
    return tensor.device, tensor.data_ptr()


def _places(model: nn.Module) -> Iterator[Place]:
    """Every registered parameter under all its names; linear layers and embeddings without a weight parameter, too."""
    for path, module in model.named_modules(remove_duplicate=False):
        weighted = isinstance(module, nn.Linear | nn.Embedding)
        for attribute in dict.fromkeys([*(["weight"] if weighted else []), *module._parameters]):
            yield Place(path, module, attribute)


def check_model(model: nn.Module, quant: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, got {type(model).__name__}")
    if quant not in FORMATS:
        raise ValueError(f"quant must be one of {', '.join(FORMATS)}, got {quant!r}")
    if isinstance(model, nn.Linear | nn.Embedding):
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which nothing holds that could hold another one instead: "
            "put it into a module, such as nn.Sequential"
        )


# ---- reasons to leave a weight -------------------------------------------------------------------------------------


def skip_rule(model: nn.Module, skip: Skip | None) -> Rule:
    """The reasons that `skip` gives."""
    if skip is None:
        heads = _output_embeddings(model)

        def is_head(place: Place) -> bool:
            return place.module in heads or place.path.rpartition(".")[2] == "lm_head"

        return lambda place: "it is the output head" if is_head(place) else None
    if callable(skip):
        return lambda place: "skip says so" if skip(place.subject, place.module) else None
    patterns = [skip] if isinstance(skip, str) else list(skip)
    names = [name for place in _places(model) for name in with_prefixes(place.name)]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"skip holds names and patterns, or is a function; got {pattern!r} in it")
        if not matches(names, pattern):
            raise ValueError(f"skip: nothing in the model is called {pattern!r}")

    def reason(place: Place) -> str | None:
        hit = next((pattern for pattern in patterns if matches(with_prefixes(place.subject), pattern)), None)
        return None if hit is None else f"skip has {hit!r}"

    return reason


def with_prefixes(name: str) -> list[str]:
    """The name, and those of all modules around it."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def matches(names: Iterable[str], pattern: str) -> bool:
    """Whether a name, or its end after a dot, is what the pattern describes."""
    return any(fnmatchcase(f".{name}", f"*.{pattern}") for name in names)


def _output_embeddings(model: nn.Module) -> set[nn.Module]:
    """Those that Transformers' models name."""
    heads = set()
    for module in model.modules():
        try:
            heads.add(module.get_output_embeddings())
        except (AttributeError, NotImplementedError):  # no model of Transformers, or one without a head
            continue
    return heads - {None}


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, Weight4bit | Int8Module)


def _obstacle(place: Place, quant: str) -> str | None:
    """Why a weight cannot be converted, regarded alone."""
    module, tensor = place.module, place.tensor
    if _is_quantized(module):
        return "it is quantized already"
    if tensor is not None and is_dtensor(tensor):
        return SHARDED
    if place.kind == "expert":
        if quant == "int8":
            return "there is no int8 form of 3-D parameters"
        if is_parametrized(module, place.attribute):
            return "it is parametrized"
    else:
        if (reason := _module_obstacle(module)) is not None:
            return reason
    if type(tensor) is not nn.Parameter:
        return f"its weight is a {type(tensor).__name__}"
    if tensor.dtype not in DTYPES:
        return f"its weight is {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.numel() == 0:
        return "its weight has no elements"
    if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
        return "its weight has gradient hooks"
    return None


def _module_obstacle(module: nn.Module) -> str | None:
    plain = "Embedding" if isinstance(module, nn.Embedding) else "Conv1D" if is_conv1d(module) else "Linear"
    if is_parametrized(module):
        return "it is parametrized"
    if (
        type(module) not in (nn.Linear, nn.Embedding)
        and (type(module).__module__, type(module).__qualname__) != _CONV1D
    ):
        return f"it is a {type(module).__name__}, not a plain {plain}"
    if "forward" in vars(module):
        return "its forward has been replaced"
    if module._parameters.keys() - {"bias"} != {"weight"} or module._buffers or module._modules:
        return "it holds more than a weight and a bias, or computes its weight"
    if module._state_dict_hooks or module._state_dict_pre_hooks or module._load_state_dict_pre_hooks:
        return "it has hooks on its state dict"
    if plain == "Embedding" and module.max_norm is not None:
        return "its max_norm changes rows that are looked up"
    return None


def _fits(other: Place, place: Place) -> bool:
    """Whether two places of one tensor can hold one quantized weight."""
    a, b = other.tensor, place.tensor
    same = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    kinds = {other.kind, place.kind}
    return same and kinds <= {"linear", "embedding"} and other.transposed == place.transposed


def _class_name(place: Place, quant: str) -> str:
    if place.kind == "expert":
        return "a 4-bit parametrization"
    if place.kind == "linear":
        return "Linear8bitLt" if quant == "int8" else "Linear4bit"
    return "Embedding8bit" if quant == "int8" else "Embedding4bit"

"""What `quantize_` converts of a model, what it leaves, and why: decided before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bnbops.dtensors import is_dtensor
from bnbops.facts import FLOATS
from bnbops.nn.convert.places import CONV1D, Place, all_places, memory_of, places_by_tensor
from bnbops.nn.kinds import kind_of
from bnbops.nn.weights.module import QuantizedModule
from bnbops.nn.weights.quantization import Quantization

SHARDED = "its weight is sharded (a DTensor): quantize the model first, then call fully_shard"

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]
Reason = Callable[[Place], str | None]  # to leave a weight


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
    model: nn.Module, quant: str = "nf4", *, skip: Skip | None = None, embeddings: bool = False, experts: bool = True
) -> QuantizationPlan:
    """What `bnbops.nn.quantize_` would convert, and what it would leave and why.

    Arguments and errors: as `bnbops.nn.quantize_`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, got {type(model).__name__}")
    if isinstance(model, nn.Linear | nn.Embedding):
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which nothing holds that could hold another one instead: "
            "put it into a module, such as nn.Sequential"
        )
    return plan_by_rule(model, quant, skip_rule(model, skip), embeddings, experts)


def plan_by_rule(model: nn.Module, quant: str, asked: Reason, embeddings: bool, experts: bool) -> QuantizationPlan:
    """As `quantization_plan`; `asked` has the reasons why weights are to be left."""
    kind = kind_of(quant)
    wanted = {"linear", *(["embedding"] if embeddings else []), *(["expert"] if experts else [])}
    candidates = [place for place in all_places(model) if place.kind in wanted]
    obstacles = {place: asked(place) or _obstacle(place, kind) for place in candidates}
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
            convert[place.subject] = kind.becomes[place.kind]
    expected = {place.subject for place in candidates if asked(place) or isinstance(place.module, QuantizedModule)}
    return QuantizationPlan(convert, leave, tuple(name for name in leave if name not in expected))


# ---- reasons to leave a weight -------------------------------------------------------------------------------------


def skip_rule(model: nn.Module, skip: Skip | None) -> Reason:
    """The reasons that `skip` gives."""
    if skip is None:
        heads = _output_embeddings(model)

        def is_head(place: Place) -> bool:
            return place.module in heads or place.path.rpartition(".")[2] == "lm_head"

        return lambda place: "it is the output head" if is_head(place) else None
    if callable(skip):
        return lambda place: "skip says so" if skip(place.subject, place.module) else None
    patterns = [skip] if isinstance(skip, str) else list(skip)
    names = [name for place in all_places(model) for name in with_prefixes(place.name)]
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
    return list(accumulate(name.split("."), "{}.{}".format))


def matches(names: Iterable[str], pattern: str) -> bool:
    """Whether a name, or its end after a dot, is what the pattern describes."""
    return any(fnmatchcase(f".{name}", f"*.{pattern}") for name in names)


def _output_embeddings(model: nn.Module) -> set[nn.Module]:
    """Those that Transformers' models name."""
    heads = set()
    for module in model.modules():
        with suppress(AttributeError, NotImplementedError):  # no model of Transformers, or one without a head
            heads.add(module.get_output_embeddings())
    return heads - {None}


def _obstacle(place: Place, kind: type[Quantization]) -> str | None:
    """Why a weight cannot be converted, regarded alone."""
    module, tensor = place.module, place.tensor
    if isinstance(module, QuantizedModule):
        return "it is quantized already"
    if tensor is not None and is_dtensor(tensor):
        return SHARDED
    if place.kind == "expert":
        if "expert" not in kind.becomes:
            return f"there is no {kind.formats[0]} form of 3-D parameters"
        if is_parametrized(module, place.attribute):
            return "it is parametrized"
    elif (reason := _module_obstacle(place)) is not None:
        return reason
    if type(tensor) is not nn.Parameter:
        return f"its weight is a {type(tensor).__name__}"
    if tensor.dtype not in FLOATS:
        return f"its weight is {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.numel() == 0:
        return "its weight has no elements"
    if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
        return "its weight has gradient hooks"
    return None


def _module_obstacle(place: Place) -> str | None:
    module = place.module
    plain = "Embedding" if isinstance(module, nn.Embedding) else "Conv1D" if place.is_conv1d else "Linear"
    if is_parametrized(module):
        return "it is parametrized"
    if type(module) not in (nn.Linear, nn.Embedding) and (type(module).__module__, type(module).__qualname__) != CONV1D:
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

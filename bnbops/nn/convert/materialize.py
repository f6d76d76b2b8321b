"""A model's tensors from named sources: whether they fit, and loading those that stay as they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from bnbops.lasting import lasting
from bnbops.nn.convert.places import Place, places_by_tensor
from bnbops.nn.convert.sources import Source
from bnbops.nn.kinds import KINDS
from bnbops.nn.weights.memory import empty

Sources = dict[str, Source]
Change = Callable[[], None]
_SHOWN = 5  # names in an error


def check_sources(sources: Sources, model: nn.Module) -> None:
    """Refuses sources that are not the model's tensors, strictly; of a shared tensor one name suffices.

    Raises:
        ValueError: missing or unexpected names, other shapes, several values for a shared tensor; or a model with
            parameters that cannot be loaded one by one.
    """
    parameters, buffers = places_by_tensor(model).values(), _buffers(model)
    for places in parameters:
        _check_loadable(places)
    shapes = {place.name: place.tensor.shape for places in (*parameters, *buffers) for place in places}
    unsaved = {places[0].name for places in buffers if all(map(_is_unsaved, places))}
    needed = [places for places in buffers if places[0].name not in unsaved or places[0].tensor.is_meta]
    names = [[place.name for place in places] for places in (*parameters, *needed)]

    missing = [group[0] for group in names if not any(name in sources for name in group)]
    unexpected = sorted(sources.keys() - shapes.keys())
    others = [
        f"{name} {list(sources[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in sources and sources[name].shape != tuple(shape)
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": others}
    if any(wrong.values()):
        said = "; ".join(f"{what}: {_list(found)}" for what, found in wrong.items() if found)
        raise ValueError(
            f"the state does not fit the model: {said}{_advice(unsaved.intersection(missing), unexpected)}"
        )
    for group in names:
        for first, second in pairwise(name for name in group if name in sources):
            if not torch.equal(sources[first].read(True), sources[second].read(True)):
                raise ValueError(f"the model shares one tensor as {first} and {second}, but the state has two for them")


def load_others(model: nn.Module, sources: Sources, quantized: set[str], device: torch.device | None) -> list[Change]:
    """Reads every tensor but the `quantized` ones. The changes that are returned put them into the model."""
    parameters = [places for places in places_by_tensor(model).values() if places[0].name not in quantized]
    buffers = [places for places in _buffers(model) if any(place.name in sources for place in places)]
    return [_change(places, sources, device) for places in (*parameters, *buffers)]


def read(names: Iterable[str], sources: Sources, like: Tensor, device: torch.device | None, transient: bool) -> Tensor:
    """A tensor by one of its names, in the dtype of `like`, and on its device unless one is given or that is meta.

    `transient`: to be used at once and dropped; otherwise nobody else holds it.
    """
    name = next(name for name in names if name in sources)
    source = sources[name]
    tensor = source.read(transient)
    if tensor.is_floating_point() != like.is_floating_point():
        raise ValueError(f"the state has {name} as {tensor.dtype}, which cannot become {like.dtype}")
    device = device or (torch.device("cpu") if like.is_meta else like.device)
    if device.type != "cpu":
        return tensor.to(device, like.dtype)
    if tensor.dtype == like.dtype and tensor.device == device and (transient or source.fresh):
        return tensor
    return empty(source.shape, like.dtype, transient).copy_(tensor)


@lasting()
def _change(places: list[Place], sources: Sources, device: torch.device | None) -> Change:
    old = places[0].tensor
    new = read([place.name for place in places], sources, old, device, transient=not old.is_meta)
    if isinstance(old, nn.Parameter) and old.is_meta:
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        vars(new).update(vars(old))

    @torch.no_grad()
    def change() -> None:
        if not old.is_meta:
            old.copy_(new)
            return
        for place in places:
            setattr(place.module, place.attribute, new)

    return change


class _Buffer(Place):
    """The place of a buffer."""

    @property
    def tensor(self) -> Tensor | None:
        return self.module._buffers[self.attribute]


def _buffers(model: nn.Module) -> Iterable[list[Place]]:
    """All places of each buffer."""
    places: dict[int, list[Place]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, buffer in module._buffers.items():
            if buffer is not None:
                places[id(buffer)].append(_Buffer(path, module, attribute))
    return places.values()


def _is_unsaved(buffer: Place) -> bool:
    return buffer.attribute in buffer.module._non_persistent_buffers_set


def _check_loadable(places: list[Place]) -> None:
    tensor = places[0].tensor
    if type(tensor) is not nn.Parameter:
        raise ValueError(
            f"state is for models of plain parameters, but {places[0].name} is a {type(tensor).__name__}; "
            "use load_state_dict instead"
        )
    for first, second in pairwise(places):
        if first.tensor.shape != second.tensor.shape or first.tensor.stride() != second.tensor.stride():
            raise ValueError(f"state: {first.name} and {second.name} share memory, but have different shapes")


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _advice(unsaved: set[str], unexpected: list[str]) -> str:
    if unsaved:
        return (
            f". State dicts do not have {_list(sorted(unsaved))}: add it to the state, or make it on another device "
            "than meta (as accelerate's init_empty_weights does)"
        )
    if any(name.endswith(tuple(kind.keys(""))) for name in unexpected for kind in KINDS):
        return (
            ". It is quantized already: call quantize_ without state on the model, on the meta device, then "
            "model.load_state_dict(..., assign=True)"
        )
    return ""

"""Where a model's tensors are registered, and what `quantize_` may take them for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

CONV1D = ("transformers.pytorch_utils", "Conv1D")


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
        if self.attribute == "weight" and (isinstance(self.module, nn.Linear) or self.is_conv1d):
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
        return self.kind == "linear" and self.is_conv1d

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape as a quantized layer has it: `[out, in]`."""
        return tuple(self.tensor.shape[::-1] if self.transposed else self.tensor.shape)

    @property
    def is_conv1d(self) -> bool:
        """Whether it is in Transformers' linear layer of GPT-2, whose weight is transposed."""
        return any((base.__module__, base.__qualname__) == CONV1D for base in type(self.module).__mro__)

    @property
    def subject(self) -> str:
        """What is converted: the module, or the expert parameter alone."""
        return self.name if self.kind == "expert" else self.path


def find(model: nn.Module, name: str) -> Place:
    path, _, attribute = name.rpartition(".")
    return Place(path, model.get_submodule(path), attribute)


def places_by_tensor(model: nn.Module) -> dict[object, list[Place]]:
    """All places of each parameter."""
    places: dict[object, list[Place]] = defaultdict(list)
    for place in all_places(model):
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


def all_places(model: nn.Module) -> Iterator[Place]:
    """Every registered parameter under all its names; linear layers and embeddings without a weight parameter, too."""
    for path, module in model.named_modules(remove_duplicate=False):
        weighted = isinstance(module, nn.Linear | nn.Embedding)
        for attribute in dict.fromkeys([*(["weight"] if weighted else []), *module._parameters]):
            yield Place(path, module, attribute)

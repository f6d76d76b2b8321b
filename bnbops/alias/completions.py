"""What modules of other libraries lack, put in after their import, as long as bnbops is installed as bitsandbytes."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial, wraps
from types import ModuleType
from typing import Any

from bnbops.nn.kinds import registered

_undo = ExitStack()


def add(module: ModuleType) -> None:
    """To one of `finder.COMPLETED`."""
    _COMPLETIONS[module.__name__](module)


def remove() -> None:
    """From all that have been completed."""
    _undo.close()


def _reverse_converters(module: ModuleType) -> None:
    """Without a reverse, a quantized model that was loaded from a checkpoint cannot be saved again."""
    for name in ("Bnb4bitDeserialize", "Bnb8bitDeserialize"):
        converter = getattr(module, name, None)  # None, while the module is being imported
        if converter is not None and "reverse_op" not in vars(converter):
            converter.reverse_op = property(_as_held)
            _undo.callback(delattr, converter, "reverse_op")


def _as_held(converter: object) -> object:
    class AsHeld(type(converter).__base__):
        """A layer's state dict has the checkpoint's tensors, under their names."""

        def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
            return input_dict

    return AsHeld()


def _offload_scales(module: ModuleType) -> None:
    """Offloading looks for all that a layer registers in the model's state dict, but that has bitsandbytes' entries for
    the scales of a quantized layer."""
    mapping = module.PrefixedDataset  # of one layer's tensors
    read = mapping.__getitem__
    if hasattr(read, "__wrapped__"):
        return  # done already

    @wraps(read)
    def __getitem__(self: Any, key: str) -> Any:
        try:
            return read(self, key)
        except KeyError:
            scales = registered(key, partial(read, self))
            if scales is None:
                raise
            return scales

    mapping.__getitem__ = __getitem__
    _undo.callback(setattr, mapping, "__getitem__", read)


_COMPLETIONS = {
    "accelerate.utils.offload": _offload_scales,
    "transformers.integrations.bitsandbytes": _reverse_converters,
}

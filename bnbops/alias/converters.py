"""What Transformers' converters for bitsandbytes lack: without a reverse, a quantized model that was loaded from a
checkpoint cannot be saved again."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def add(module: ModuleType) -> None:
    """To `transformers.integrations.bitsandbytes`."""
    for converter in _converters(module):
        if "reverse_op" not in vars(converter):
            converter.reverse_op = _Reverse(_as_held)


def remove(module: ModuleType) -> None:
    for converter in _converters(module):
        if isinstance(vars(converter).get("reverse_op"), _Reverse):
            del converter.reverse_op


class _Reverse(property):
    """Ours, not Transformers' own."""


def _as_held(converter: object) -> object:
    class AsHeld(type(converter).__base__):
        """A layer's state dict has the checkpoint's tensors, under their names."""

        def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
            return input_dict

    return AsHeld()


def _converters(module: ModuleType) -> list[type]:
    """None, while the module is being imported."""
    found = (getattr(module, name, None) for name in ("Bnb4bitDeserialize", "Bnb8bitDeserialize"))
    return [converter for converter in found if converter is not None]

"""Modules by the names that they had in 2026, before there were folders: files of then by `torch.save` name them."""

from __future__ import annotations

import sys

import torch

from bnbops.nn.convert import resizing
from bnbops.nn.four_bit import format as scales_4bit
from bnbops.nn.four_bit import parameter as params_4bit
from bnbops.nn.int8 import parameter as params_8bit
from bnbops.nn.layers import embedding, embedding_4bit, embedding_8bit, linear_4bit, linear_8bit

_MODULES = {
    "embedding": embedding,
    "embedding_4bit": embedding_4bit,
    "embedding_8bit": embedding_8bit,
    "linear_4bit": linear_4bit,
    "linear_8bit": linear_8bit,
    "params_4bit": params_4bit,
    "params_8bit": params_8bit,
    "resizing": resizing,
    "scales_4bit": scales_4bit,
}
sys.modules.update({f"bnbops.nn.{name}": module for name, module in _MODULES.items()})

# With weights_only=True torch takes no other classes and functions than these.
_SAFE = (
    *("params_4bit.Params4bit", "params_4bit._rebuild", "scales_4bit.Format"),
    *("params_8bit.Int8Params", "params_8bit._rebuild"),
)
torch.serialization.add_safe_globals(
    [(getattr(_MODULES[module], name), f"bnbops.nn.{module}.{name}") for module, name in (s.split(".") for s in _SAFE)]
)

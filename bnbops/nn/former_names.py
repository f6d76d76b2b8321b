"""Modules by the names that they had in 2026, before there were folders: files of then by `torch.save` name them."""

from __future__ import annotations

import importlib
import sys

import torch

_LAYERS = ("embedding", "embedding_4bit", "embedding_8bit", "linear_4bit", "linear_8bit")
_OTHERS = {
    "params_4bit": "four_bit.parameter",
    "params_8bit": "int8.parameter",
    "resizing": "convert.resizing",
    "scales_4bit": "four_bit.format",
}
_SAFE = {  # with weights_only=True torch takes no other classes and functions than these
    "params_4bit": ("Params4bit", "_rebuild"),
    "params_8bit": ("Int8Params", "_rebuild"),
    "scales_4bit": ("Format",),
}

for former, name in ({layer: f"layers.{layer}" for layer in _LAYERS} | _OTHERS).items():
    module = sys.modules[f"bnbops.nn.{former}"] = importlib.import_module(f"bnbops.nn.{name}")
    torch.serialization.add_safe_globals(
        [(getattr(module, each), f"bnbops.nn.{former}.{each}") for each in _SAFE.get(former, ())]
    )

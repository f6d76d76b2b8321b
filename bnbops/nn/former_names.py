"""Modules by the names that they had in 2026, before there were folders: files of then by `torch.save` name them."""

from __future__ import annotations

import importlib
import sys

import torch

_LAYERS = ("embedding", "embedding_4bit", "embedding_8bit", "linear_4bit", "linear_8bit")
# Where they are now, and their classes and functions that torch is to take with weights_only=True, beside its own.
_NOW = {layer: (f"layers.{layer}", ()) for layer in _LAYERS} | {
    "params_4bit": ("four_bit.parameter", ("Params4bit", "_rebuild")),
    "params_8bit": ("int8.parameter", ("Int8Params", "_rebuild")),
    "resizing": ("convert.resizing", ()),
    "scales_4bit": ("four_bit.format", ("Format",)),
}

for former, (name, safe) in _NOW.items():
    module = sys.modules[f"bnbops.nn.{former}"] = importlib.import_module(f"bnbops.nn.{name}")
    torch.serialization.add_safe_globals([(getattr(module, each), f"bnbops.nn.{former}.{each}") for each in safe])

"""Models of Transformers whose embeddings are quantized cannot resize them, and say so."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from bnbops.nn.weights.module import is_quantized


def guard_resizing(model: nn.Module) -> None:
    """Puts the check in front of the method: Transformers would fail half-way, at a table of integers."""
    for module in model.modules():
        if hasattr(type(module), "resize_token_embeddings"):
            module.resize_token_embeddings = partial(resize_token_embeddings, module)  # copies, pickles


def resize_token_embeddings(
    self: nn.Module, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **kwargs: Any
) -> nn.Module:
    """As in Transformers.

    Raises:
        RuntimeError: the embedding or the output head is quantized, and of another size; nothing has changed.
    """
    tables = (self.get_input_embeddings(), self.get_output_embeddings())
    for name, module in self.named_modules():
        if module not in tables or not is_quantized(module):
            continue
        rows = module.weight_shape[0] if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            rows += -rows % pad_to_multiple_of
        if rows != module.weight_shape[0]:
            raise RuntimeError(
                f"{name} is quantized ({type(module).__name__}) and has {module.weight_shape[0]} rows, so it cannot be "
                f"resized to {rows}: resize the float model and quantize it then, or leave embeddings and head in "
                "floating point (embeddings=False, and skip has the head by default)"
            )
    return type(self).resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of, **kwargs)

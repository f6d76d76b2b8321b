"""State dicts by the names that modules register: how sharded models save and load quantized layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bnbops.nn.kinds import KINDS


def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """A model's parameters and persistent buffers, as they are registered, in the model's memory.

    `state_dict()` of a quantized layer has bitsandbytes' entries, whose shapes cannot be sharded by rows. These can, so
    they are what a sharded model has in its state dict. With them a model that is not sharded

    * hands its tensors to a sharded one: `set_model_state_dict(sharded, plain_state_dict(model), options=...)` with
      `full_state_dict=True`;
    * reads a checkpoint of a sharded one in place: `torch.distributed.checkpoint.load(plain_state_dict(model), ...)`;
    * takes a full state dict of a sharded one by its own `load_state_dict`, and then saves bitsandbytes' entries.
    """
    state: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        nn.Module._save_to_state_dict(module, state, f"{path}." if path else "", keep_vars=False)
    return state


def registered(name: str, read: Callable[[str], Tensor]) -> Tensor | None:
    """A quantized layer's scales by the name that it registers, of bitsandbytes' entries; None for other names.

    Raises:
        KeyError: from `read`, which gives an entry by its name.
    """
    path, found, own = name.rpartition("weight_")
    tensors = (kind.registered(f"{path}weight", own, read) for kind in KINDS)
    return next((tensor for tensor in tensors if tensor is not None), None) if found else None

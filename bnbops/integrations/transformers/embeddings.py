"""32-bit optimizer states for a model's embeddings, as Transformers' Trainer asks for with bitsandbytes' optimizers."""

from __future__ import annotations

from torch import nn

from bnbops.optim import GlobalOptimManager


def keep_embeddings_in_32_bits(model: nn.Module) -> list[str]:
    """Optimizers that are made, or have been, keep the states of the model's embeddings in 32 bits.

    Call it before the first step and, in a program that resumes, before the states are loaded. It holds for the weight
    that an `nn.Embedding` has by then, so also for a head that is tied to it. An embedding whose ``optim_bits`` is
    overridden already is left alone.

    Args:
        model: any module; `PeftModel`s too.

    Returns:
        The names of the embeddings that it was said of.

    Warns:
        UserWarning: an optimizer has built the state of such a weight.
    """
    manager = GlobalOptimManager.get_instance()
    overridden = {id(param) for param, config in manager.overrides().items() if "optim_bits" in config}
    names = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Embedding) else None
        if weight is not None and id(weight) not in overridden:
            manager.register_module_override(module, "weight", {"optim_bits": 32})
            names.append(name)
    return names

"""PEFT on bnbops: `import bnbops.integrations.peft`, and adapters of bnbops' layers train, merge and unmerge.

The import registers the layers with PEFT (`register`), for `get_peft_model`, `PeftModel.from_pretrained` and
`load_adapter` alike; `unregister` takes that back. No bitsandbytes is needed.

What it replaces in PEFT: `_create_new_module` of `LoraModel`, `AdaLoraModel` and `IA3Model`, so that they know bnbops'
layers, and what else of the latter two asks for bitsandbytes; `_inject_parameters`, so that `target_parameters` finds
experts in 4 bits; `dequantize_module_weight`, with which DoRA reads a weight; and `create_loraplus_optimizer`, which
imports bitsandbytes for 8-bit optimizers. Layers and optimizers that are not bnbops' get what they got before.
"""

from bnbops.versions import require

require("peft", "bnbops.integrations.peft")

from bnbops.integrations.peft.dispatch import register, unregister  # noqa: E402
from bnbops.integrations.peft.layers import AdaLoraLinear, IA3Linear, LoraEmbedding, LoraLinear, ParamWrapper  # noqa: E402

__all__ = ["AdaLoraLinear", "IA3Linear", "LoraEmbedding", "LoraLinear", "ParamWrapper", "register", "unregister"]

register()

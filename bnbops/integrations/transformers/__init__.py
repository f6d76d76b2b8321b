"""bnbops in Transformers: importing this registers the quantization method "bnbops".

`from_pretrained(..., quantization_config=BnbOpsConfig("nf4"))` quantizes a model tensor by tensor while it loads, and
what `save_pretrained` then writes loads again, wherever this module has been imported.
"""

from importlib import import_module

from bnbops.integrations.requirements import require

require("transformers", "bnbops.integrations.transformers")

from bnbops.integrations.transformers.bitsandbytes import load_bitsandbytes_checkpoints  # noqa: E402
from bnbops.integrations.transformers.config import BnbOpsConfig  # noqa: E402
from bnbops.integrations.transformers.quantizer import BnbOpsHfQuantizer, register  # noqa: E402

register()

# Modules with what else is exported, imported on first use: they bring in the Trainer.
_LAZY: dict[str, str] = {
    "CompiledStep": "trainer",
    "CompiledTrainer": "trainer",
    "keep_embeddings_in_32_bits": "embeddings",
}

__all__ = ["BnbOpsConfig", "BnbOpsHfQuantizer", "load_bitsandbytes_checkpoints", *_LAZY]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")

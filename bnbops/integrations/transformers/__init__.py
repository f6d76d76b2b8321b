"""bnbops in Transformers: importing this registers the quantization method "bnbops".

`from_pretrained(..., quantization_config=BnbOpsConfig("nf4"))` quantizes a model tensor by tensor while it loads, and
what `save_pretrained` then writes loads again, wherever this module has been imported.
"""

from importlib import import_module

from bnbops.versions import require

require("transformers", "bnbops.integrations.transformers")

from bnbops.integrations.transformers.bitsandbytes import load_bitsandbytes_checkpoints  # noqa: E402
from bnbops.integrations.transformers.config import BnbOpsConfig  # noqa: E402
from bnbops.integrations.transformers.models import keep_embeddings_in_32_bits  # noqa: E402
from bnbops.integrations.transformers.quantizer import BnbOpsHfQuantizer, register  # noqa: E402

register()

_OF_TRAINER = ("CompiledStep", "CompiledTrainer")  # imported on first use

__all__ = ["BnbOpsConfig", "BnbOpsHfQuantizer", "keep_embeddings_in_32_bits", "load_bitsandbytes_checkpoints"]
__all__ += _OF_TRAINER


def __getattr__(name: str) -> object:
    if name in _OF_TRAINER:
        return getattr(import_module(f"{__name__}.trainer"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")

"""`bitsandbytes.utils`: how a quantization's description becomes a tensor of a state dict, and back."""

from bnbops.quant_state import _pack as pack_dict_to_tensor
from bnbops.quant_state import _unpack as unpack_tensor_to_dict

__all__ = ["pack_dict_to_tensor", "unpack_tensor_to_dict"]

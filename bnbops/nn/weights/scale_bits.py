"""fp32 scales as int32: no cast of a model to another float dtype, nor FSDP's mixed precision, touches their bits.

The operators take the bits as they are. Only what shows scales to people and files views them as fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnbops.lasting import lasting


@lasting()
def to_bits(scales: Tensor) -> Tensor:
    return scales.detach().to(torch.float32).contiguous().view(torch.int32)


def from_bits(bits: Tensor) -> Tensor:
    """The scales; also from scales of a float dtype, rounded to fp32."""
    return bits.view(torch.float32) if bits.dtype == torch.int32 else bits.to(torch.float32)

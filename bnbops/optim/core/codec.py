"""What the bytes of an 8-bit state mean, for whoever reads or writes one outside a step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from bnbops.codebooks import create_dynamic_map
from bnbops.facts import STATE_BLOCK, STATES
from bnbops.lasting import lasting
from bnbops.optim.core.state import absmax_shape

DIVISORS = frozenset(state.name for state in STATES.values() if state.role.divisor)
with lasting():
    _MAPS = {signed: create_dynamic_map(signed) for signed in (True, False)}
ONE = 255  # the code of 1 in either map
_ZEROS = {signed: int((code == 0).nonzero()) for signed, code in _MAPS.items()}


def code_map(name: str, device: torch.device) -> Tensor:
    """The codebook of a state, fp32 [256]."""
    return _MAPS[STATES[name].role.signed].to(device)


def zero_code(name: str) -> int:
    """The code of 0 in a state's codebook."""
    return _ZEROS[STATES[name].role.signed]


def decoded(name: str, codes: Tensor, absmax: Tensor) -> Tensor:
    """The values of an 8-bit state.

    Args:
        name: the state's.
        codes: uint8, of the parameter's shape.
        absmax: fp32 `[rows, blocks]`, or `[blocks]` of the whole.

    Returns:
        fp32 of the codes' shape.
    """
    blocks = _blocked(codes, absmax.dim() == 1)
    code = code_map(name, codes.device)
    values = torch.ops.bnbops.dequantize_blockwise(blocks, absmax.reshape(-1), code, STATE_BLOCK, torch.float32)
    return _unblocked(values, codes.shape)


def encoded(name: str, values: Tensor, *, flat: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of an 8-bit state, as a step writes them.

    Args:
        name: the state's.
        values: fp32, of the parameter's shape.
        flat: blocks of the whole, not of each row.

    Returns:
        uint8 codes of the values' shape; fp32 scales `[rows, blocks]`, or `[blocks]` if `flat`.
    """
    blocks = _blocked(values, flat)
    codes, absmax = torch.ops.bnbops.quantize_blockwise(blocks, code_map(name, values.device), STATE_BLOCK)
    codes = _unblocked(codes, values.shape)
    if name in DIVISORS:  # what is positive stays so, or the next step would divide by 0
        codes = torch.where((values > 0) & (codes == zero_code(name)), zero_code(name) + 1, codes)
    return codes, absmax if flat else absmax.view(absmax_shape(values.shape))


def _blocked(x: Tensor, flat: bool) -> Tensor:
    """The same elements in an order in which no block of 256 straddles rows, filled up with zeros."""
    inner = 0 if flat or not x.numel() else x.numel() // x.shape[0]
    return pad(x.reshape(-1, inner), (0, -inner % STATE_BLOCK)) if inner % STATE_BLOCK else x.contiguous()


def _unblocked(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Undoes `_blocked`."""
    return blocks if blocks.shape == shape else blocks[:, : shape.numel() // shape[0]].reshape(shape)

"""Adam and AdamW as the papers state them, and 8-bit states around them.

D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization" (arXiv:1412.6980), algorithm 1.
I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization" (arXiv:1711.05101), algorithm 2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.quantize import block_absmax, normalise

BLOCKSIZE = 256


@dataclass(frozen=True)
class Hyper:
    """The numbers of one parameter group."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False


def adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, h: Hyper) -> tuple[Tensor, Tensor, Tensor]:
    """One step: the new parameter and moments, in float64. `step` counts from 1 (t in the paper).

    Weight decay is decoupled (algorithm 2, line 12) for Adam as well. An element with a non-finite gradient stays.
    """
    p, g, m, v = (x.double() for x in (p, g, m, v))
    if h.maximize:
        g = -g
    m_new = h.beta1 * m + (1 - h.beta1) * g  # algorithm 1: biased first moment
    v_new = h.beta2 * v + (1 - h.beta2) * g * g  # biased second raw moment
    m_hat = m_new / (1 - h.beta1**step)  # bias corrections
    v_hat = v_new / (1 - h.beta2**step)
    denominator = v_hat.sqrt() + h.eps
    update = torch.where(denominator == 0, 0.0, m_hat / denominator)
    p_new = p - h.lr * (update + h.weight_decay * p)
    ok = g.isfinite()
    return torch.where(ok, p_new, p), torch.where(ok, m_new, m), torch.where(ok, v_new, v)


def state_blocks(x: Tensor, absmax: Tensor) -> list[Tensor]:
    """The blocks that share a scale, in the order of `absmax.flatten()`: flat ones, or ones that end with their row."""
    if x.numel() == 0:
        return []
    rows = [x.flatten()] if absmax.ndim == 1 else [row.flatten() for row in x]
    return [block for row in rows for block in row.split(BLOCKSIZE)]


def row_absmax(shape: torch.Size) -> Tensor:
    """A zero absmax in the row layout: [R, ceil(inner / 256)]."""
    return torch.zeros(shape[0], -(-math.prod(shape[1:]) // BLOCKSIZE))


def flat_absmax(shape: torch.Size) -> Tensor:
    """A zero absmax in the flat layout: [ceil(numel / 256)]."""
    return torch.zeros(-(-math.prod(shape) // BLOCKSIZE))


def decode(codes: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """The fp32 values of an 8-bit state."""
    pieces = [code[b.long()] * scale for b, scale in zip(state_blocks(codes, absmax), absmax.flatten(), strict=True)]
    return torch.cat(pieces).view(codes.shape) if pieces else torch.zeros(codes.shape)


def state_absmax(x: Tensor, like: Tensor) -> Tensor:
    """The absmax of `x` (fp32) in the layout of `like`."""
    return torch.tensor([block_absmax(b) for b in state_blocks(x.double(), like)]).float().view(like.shape)


def state_normalised(x: Tensor, like: Tensor) -> Tensor:
    """Each element of `x` over the absmax of its block: what the encoder looks up."""
    pieces = [normalise(b) for b in state_blocks(x.double(), like)]
    return torch.cat(pieces).view(x.shape) if pieces else x.double()


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance of two numbers of `dtype` around `x`."""
    info = torch.finfo(dtype)
    octave = torch.floor(torch.log2(x.abs().clamp_min(info.tiny)))
    return 2.0**octave * info.eps / 2

"""AdamW (Loshchilov & Hutter 2019, algorithm 2): Adam's operator with another default."""

from __future__ import annotations

from typing import Any

from bnbops.optim.adam import Adam


class AdamW(Adam):
    """`Adam` with weight_decay = 0.01 by default; the arguments are the same."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged, **keywords
        )


class AdamW8bit(AdamW):
    """`AdamW` with 8-bit states; its `optim_bits` argument is there for bitsandbytes' signature only."""

    _fixed_bits = 8


class AdamW32bit(AdamW):
    """`AdamW` with 32-bit states; its `optim_bits` argument is there for bitsandbytes' signature only."""

    _fixed_bits = 32

"""Adam (Kingma & Ba 2015, algorithm 1)."""

from __future__ import annotations

from typing import Any

from bnbops.optim.base import Optimizer


def _check_unsupported(name: str, amsgrad: bool, is_paged: bool, percentile_clipping: int, block_wise: bool) -> None:
    """Refuses arguments that scripts pass but this version does not implement."""
    if amsgrad:
        raise ValueError(f"{name} does not support amsgrad=True")
    if is_paged:
        raise ValueError(f"{name} does not support is_paged=True yet")
    if percentile_clipping != 100:
        raise ValueError(f"{name} does not support percentile_clipping={percentile_clipping} yet, only 100 (off)")
    if not block_wise:
        raise ValueError(f"{name} quantizes in blocks only; block_wise=False is not supported")


class Adam(Optimizer):
    """Adam with 32-bit or 8-bit states (`optim_bits`).

    Weight decay is decoupled, as in AdamW and in bitsandbytes' Adam; torch.optim.Adam adds it to the gradient.

    Args:
        params: parameters or param groups; float32, bfloat16 or float16. Gradients may also be float32.
        lr: learning rate, a float or a 0-dim tensor.
        betas: decay rates of the averages of gradient and squared gradient.
        eps: added to the denominator.
        weight_decay: parameters shrink by `lr * weight_decay` a step.
        amsgrad: must be False.
        optim_bits: 8 quantizes the states of parameters with two dimensions or more and at least `min_8bit_size`
            elements; their shape decides, whatever the sharding.
        args: an object with attributes `optim_bits` and `min_8bit_size` that take the place of these two.
        min_8bit_size: see `optim_bits`.
        is_paged: must be False.
        percentile_clipping: must be 100 (off).
        block_wise: must be True.
        maximize: ascend instead of descend.

    Raises:
        ValueError: a value out of range, or one that is not supported.
    """

    _op = "adam_step_"
    _state_names = ("exp_avg", "exp_avg_sq")
    _fixed_bits: int | None = None  # of the classes whose name says the precision

    def __init__(
        self,
        params,
        lr=1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        maximize: bool = False,
    ) -> None:
        name = type(self).__name__
        _check_unsupported(name, amsgrad, is_paged, percentile_clipping, block_wise)
        if args is not None:
            optim_bits, min_8bit_size = args.optim_bits, args.min_8bit_size
        elif self._fixed_bits is not None:
            if optim_bits not in (32, self._fixed_bits):  # 32 is the signature's default
                raise ValueError(f"{name} always has {self._fixed_bits}-bit states, got optim_bits={optim_bits}")
            optim_bits = self._fixed_bits
        if len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas}")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "optim_bits": optim_bits,
            "min_8bit_size": min_8bit_size,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _options(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": group["weight_decay"]}


class Adam8bit(Adam):
    """`Adam` with 8-bit states; its `optim_bits` argument is there for bitsandbytes' signature only."""

    _fixed_bits = 8


class Adam32bit(Adam):
    """`Adam` with 32-bit states; its `optim_bits` argument is there for bitsandbytes' signature only."""

    _fixed_bits = 32

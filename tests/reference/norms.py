"""Norms, and what is made of them: trust ratios and percentile clipping. Plain Python numbers throughout."""

import math

from torch import Tensor


def squared_norm(x: Tensor) -> float:
    """The sum of squares of the finite elements, correctly rounded (as math.fsum is)."""
    return math.fsum(value * value for value in x.double().flatten().tolist() if math.isfinite(value))


def lamb_trust(p_norm: float, u_norm: float, max_unorm: float = 1.0, trust_clip: bool = False) -> float:
    """arXiv:1904.00962, algorithm 2: phi(|x|) / |r + lambda * x|, with phi(z) = max_unorm * z."""
    if max_unorm == 0 or p_norm == 0 or u_norm == 0:
        return 1.0
    trust = max_unorm * p_norm / u_norm
    return min(trust, 1.0) if trust_clip else trust


def lars_trust(
    p_norm: float, g_norm: float, weight_decay: float, max_unorm: float = 1.0, trust_clip: bool = False
) -> float:
    """arXiv:1708.03888, equation 6: eta * |w| / (|g| + beta * |w|), with eta = max_unorm."""
    denominator = g_norm + weight_decay * p_norm
    if max_unorm == 0 or p_norm == 0 or denominator == 0:
        return 1.0
    trust = max_unorm * p_norm / denominator
    return min(trust, 1.0) if trust_clip else trust


def percentile_clip(history: list[float], squared_norm: float, t: int, percentile: int) -> tuple[list[float], float]:
    """bitsandbytes' percentile clipping: the new history of 100 squared norms, and the factor of the gradient.

    No gradient is longer than the `percentile`-th of the last 100. The first one counts as 100 of them. `t` counts
    from 1.
    """
    history = [squared_norm] * 100 if t == 1 else [squared_norm if i == t % 100 else x for i, x in enumerate(history)]
    if squared_norm == 0:
        return history, 1.0
    return history, min(1.0, math.sqrt(sorted(history)[percentile] / squared_norm))

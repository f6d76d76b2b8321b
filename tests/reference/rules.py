"""Every optimizer's update as its paper states it, one function a rule.

`rule(p, g, states, t, **options)` returns the new parameter and the new states; nothing is changed in place. `t` counts
from 1. `g` is the gradient as the paper means it (ascent, scaling, clipping and non-finite elements are done: see
`reference.step`). The arithmetic is that of the arguments: float64 tensors, or `Rounded` ones, which also know what the
same computation in fp32 could lose.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from reference.rounding import Number, divide

Stepped = tuple[Number, list[Number]]


def adam(p, g, states, t, *, lr, beta1, beta2, eps, weight_decay) -> Stepped:
    """D. P. Kingma, J. Ba, "Adam" (arXiv:1412.6980), algorithm 1, with the decoupled weight decay of I. Loshchilov,
    F. Hutter, "Decoupled Weight Decay Regularization" (arXiv:1711.05101), algorithm 2, line 12."""
    m, v = states
    m = beta1 * m + (1 - beta1) * g  # biased first moment
    v = beta2 * v + (1 - beta2) * g * g  # biased second raw moment
    m_hat = m / (1 - beta1**t)  # bias corrections
    v_hat = v / (1 - beta2**t)
    return p - lr * (divide(m_hat, v_hat.sqrt() + eps) + weight_decay * p), [m, v]


def sgd(p, g, states, t, *, lr, weight_decay) -> Stepped:
    """H. Robbins, S. Monro, "A Stochastic Approximation Method" (1951), with coupled weight decay (torch.optim.SGD)."""
    return p - lr * (g + weight_decay * p), []


def momentum(p, g, states, t, *, lr, momentum, dampening, weight_decay, nesterov) -> Stepped:
    """I. Sutskever et al., "On the importance of initialization and momentum in deep learning" (ICML 2013), equations 1
    to 4, in torch.optim.SGD's form: the learning rate stays outside the buffer, whose first value is the gradient."""
    (buffer,) = states
    g = g + weight_decay * p
    buffer = g if t == 1 else momentum * buffer + (1 - dampening) * g
    direction = g + momentum * buffer if nesterov else buffer
    return p - lr * direction, [buffer]


def lion(p, g, states, t, *, lr, beta1, beta2, weight_decay) -> Stepped:
    """X. Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675), algorithm 2."""
    (m,) = states
    c = beta1 * m + (1 - beta1) * g
    return p - lr * (c.sign() + weight_decay * p), [beta2 * m + (1 - beta2) * g]


def rmsprop(p, g, states, t, *, lr, alpha, eps, weight_decay) -> Stepped:
    """T. Tieleman, G. Hinton, "Neural Networks for Machine Learning" (2012), lecture 6e, slide 29; eps and coupled
    weight decay as torch.optim.RMSprop."""
    (v,) = states
    g = g + weight_decay * p
    v = alpha * v + (1 - alpha) * g * g
    return p - lr * divide(g, v.sqrt() + eps), [v]


def rmsprop_momentum(p, g, states, t, *, lr, alpha, eps, weight_decay, momentum) -> Stepped:
    """RMSprop whose normalised gradients go through a momentum buffer (torch.optim.RMSprop)."""
    v, buffer = states
    g = g + weight_decay * p
    v = alpha * v + (1 - alpha) * g * g
    buffer = momentum * buffer + divide(g, v.sqrt() + eps)
    return p - lr * buffer, [v, buffer]


def adagrad(p, g, states, t, *, lr, lr_decay, eps, weight_decay) -> Stepped:
    """J. Duchi, E. Hazan, Y. Singer, "Adaptive Subgradient Methods" (JMLR 12, 2011), figure 1 with a diagonal matrix;
    lr_decay, eps and coupled weight decay as torch.optim.Adagrad."""
    (total,) = states
    g = g + weight_decay * p
    total = total + g * g
    return p - lr / (1 + (t - 1) * lr_decay) * divide(g, total.sqrt() + eps), [total]


def lamb_direction(p, g, states, t, *, beta1, beta2, eps, weight_decay, bias_correction, adam_w_mode) -> Stepped:
    """What algorithm 2 of LAMB (see `lamb`) multiplies by learning rate and trust ratio: r + lambda * x."""
    m, v = states
    if not adam_w_mode:  # weight decay in the gradient, as Adam had it before AdamW
        g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**t) if bias_correction else m
    v_hat = v / (1 - beta2**t) if bias_correction else v
    r = divide(m_hat, v_hat.sqrt() + eps)
    return r + weight_decay * p if adam_w_mode else r, [m, v]


def lamb(p, g, states, t, *, lr, trust, **options) -> Stepped:
    """Y. You et al., "Large Batch Optimization for Deep Learning" (arXiv:1904.00962), algorithm 2; `trust` is
    phi(|x|) / |r + lambda * x| (`norms.lamb_trust`)."""
    u, states = lamb_direction(p, g, states, t, **options)
    return p - lr * trust * u, states


def lars(p, g, states, t, *, lr, trust, momentum, dampening, weight_decay, nesterov) -> Stepped:
    """Y. You, I. Gitman, B. Ginsburg, "Large Batch Training of Convolutional Networks" (arXiv:1708.03888), algorithm 1
    with `trust` of equation 6 (`norms.lars_trust`), around the momentum of `momentum` above."""
    (buffer,) = states
    g = trust * (g + weight_decay * p)
    buffer = g if t == 1 else momentum * buffer + (1 - dampening) * g
    direction = g + momentum * buffer if nesterov else buffer
    return p - lr * direction, [buffer]


def ademamix(p, g, states, t, *, lr, beta1, beta2, beta3, alpha, eps, weight_decay, t_alpha, t_beta3) -> Stepped:
    """M. Pagliardini, P. Ablin, D. Grangier, "The AdEMAMix Optimizer" (arXiv:2409.03137), algorithm 1."""
    m1, m2, v = states
    alpha, beta3 = ademamix_alpha(t, alpha, t_alpha), ademamix_beta3(t, beta1, beta3, t_beta3)
    m1 = beta1 * m1 + (1 - beta1) * g
    m2 = beta3 * m2 + (1 - beta3) * g
    v = beta2 * v + (1 - beta2) * g * g
    m1_hat = m1 / (1 - beta1**t)  # the slow average is not corrected
    v_hat = v / (1 - beta2**t)
    update = divide(m1_hat + alpha * m2, v_hat.sqrt() + eps)
    return p - lr * (update + weight_decay * p), [m1, m2, v]


def ademamix_alpha(t: int, alpha: float, t_alpha: int) -> float:
    """Algorithm 1's scheduler of alpha, equation 4; 0 steps are no schedule."""
    return min(t * alpha / t_alpha, alpha) if t_alpha else alpha


def ademamix_beta3(t: int, beta1: float, beta3: float, t_beta3: int) -> float:
    """Algorithm 1's scheduler of beta3, equation 5; 0 steps are no schedule. From beta1 = 0 it takes the limit."""
    if not t_beta3 or beta3 == 0:
        return beta3
    part = t / t_beta3
    if part >= 1:  # beyond its horizon the formula would pass beta3, or divide by zero
        return beta3
    if beta1 == 0:
        return min(math.exp(math.log(beta3) / part), beta3)
    log1, log3 = math.log(beta1), math.log(beta3)
    return min(math.exp(log1 * log3 / ((1 - part) * log3 + part * log1)), beta3)


@dataclass(frozen=True)
class Rule:
    """A row of the table of optimizers."""

    update: Callable[..., Stepped]
    states: dict[str, bool]  # by name, in order: is its 8-bit codebook signed?
    options: dict[str, Any]  # what the tests take unless they say otherwise
    trust: bool = False  # takes a trust ratio per parameter

    @property
    def operator(self) -> torch._ops.OpOverload:
        """The operator under test."""
        return getattr(torch.ops.bnbops, f"{self.update.__name__}_step_").default


_DECAY = {"lr": 3e-3, "weight_decay": 0.1}
_ADAM = _DECAY | {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
_MOMENTUM = _DECAY | {"momentum": 0.9, "dampening": 0.2, "nesterov": False}
_RMSPROP = _DECAY | {"alpha": 0.99, "eps": 1e-8}
_SCHEDULED = {"beta3": 0.9999, "alpha": 5.0, "t_alpha": 10, "t_beta3": 10}

RULES = {
    "adam": Rule(adam, {"exp_avg": True, "exp_avg_sq": False}, _ADAM),
    "sgd": Rule(sgd, {}, _DECAY),
    "momentum": Rule(momentum, {"momentum_buffer": True}, _MOMENTUM),
    "lion": Rule(lion, {"exp_avg": True}, _DECAY | {"beta1": 0.9, "beta2": 0.99}),
    "rmsprop": Rule(rmsprop, {"square_avg": True}, _RMSPROP),
    "rmsprop_momentum": Rule(
        rmsprop_momentum, {"square_avg": True, "momentum_buffer": True}, _RMSPROP | {"momentum": 0.9}
    ),
    "adagrad": Rule(adagrad, {"sum": True}, _DECAY | {"lr_decay": 0.01, "eps": 1e-10}),
    "lamb": Rule(
        lamb,
        {"exp_avg": True, "exp_avg_sq": False},
        _ADAM | {"bias_correction": True, "adam_w_mode": True},
        trust=True,
    ),
    "lars": Rule(lars, {"momentum_buffer": True}, _MOMENTUM, trust=True),
    "ademamix": Rule(ademamix, {"exp_avg": True, "exp_avg_slow": True, "exp_avg_sq": False}, _ADAM | _SCHEDULED),
}

"""Every optimizer's update as its paper states it.

A rule is the direction of a step, by a function of its name, and how far the step goes along it:
`direction(p, g, states, t, **options)` returns it and the new states; nothing is changed in place. `t` counts from 1.
`g` is the gradient as the paper means it: ascent, scaling, clipping and non-finite elements are done. The arithmetic is
that of the arguments: float64 tensors, or numbers of another kind that have registered a `divide`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch


@singledispatch
def divide(x, y):
    """x / y, and 0 where y is 0: no step where nothing has accumulated."""
    return torch.where(y == 0, 0.0, x / y)


def adam(p, g, states, t, *, beta1, beta2, eps, **_):
    """D. P. Kingma, J. Ba, "Adam" (arXiv:1412.6980), algorithm 1, but for the first bias correction, which is in the
    rate; weight decay as I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization" (arXiv:1711.05101),
    algorithm 2, line 12."""
    m, v = _average(states[0], g, beta1), _average(states[1], g * g, beta2)
    return divide(m, (v / (1 - beta2**t)).sqrt() + eps), [m, v]


def lamb(p, g, states, t, *, beta1, beta2, eps, weight_decay, bias_correction, adam_w_mode, **_):
    """Y. You et al., "Large Batch Optimization for Deep Learning" (arXiv:1904.00962), algorithm 2: r + lambda * x. The
    rate has `trust`, phi(|x|) / |r + lambda * x|."""
    if not adam_w_mode:  # weight decay in the gradient, as Adam had it before AdamW
        g = g + weight_decay * p
    m, v = _average(states[0], g, beta1), _average(states[1], g * g, beta2)
    m_hat = m / (1 - beta1**t) if bias_correction else m
    v_hat = v / (1 - beta2**t) if bias_correction else v
    r = divide(m_hat, v_hat.sqrt() + eps)
    return r + weight_decay * p if adam_w_mode else r, [m, v]


def sgd(p, g, states, t, *, weight_decay, **_):
    """H. Robbins, S. Monro, "A Stochastic Approximation Method" (1951), with coupled weight decay (torch.optim.SGD)."""
    return g + weight_decay * p, []


def momentum(p, g, states, t, *, momentum, dampening, weight_decay, nesterov, trust=1.0, **_):
    """I. Sutskever et al., "On the importance of initialization and momentum in deep learning" (ICML 2013), equations 1
    to 4, in torch.optim.SGD's form: the learning rate stays outside the buffer, whose first value is the gradient."""
    g = trust * (g + weight_decay * p)
    buffer = g if t == 1 else momentum * states[0] + (1 - dampening) * g
    return g + momentum * buffer if nesterov else buffer, [buffer]


def lars(p, g, states, t, **options):
    """Y. You, I. Gitman, B. Ginsburg, "Large Batch Training of Convolutional Networks" (arXiv:1708.03888), algorithm 1
    with `trust` of equation 6, around the momentum of `momentum` above."""
    return momentum(p, g, states, t, **options)


def lion(p, g, states, t, *, beta1, beta2, **_):
    """X. Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675), algorithm 2."""
    return _average(states[0], g, beta1).sign(), [_average(states[0], g, beta2)]


def signum(p, g, states, t, *, momentum, **_):
    """J. Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems" (arXiv:1802.04434), algorithm 2,
    with decoupled weight decay."""
    m = _average(states[0], g, momentum)
    return m.sign(), [m]


def rmsprop(p, g, states, t, *, alpha, eps, weight_decay, **_):
    """T. Tieleman, G. Hinton, "Neural Networks for Machine Learning" (2012), lecture 6e, slide 29; eps and coupled
    weight decay as torch.optim.RMSprop."""
    g = g + weight_decay * p
    v = _average(states[0], g * g, alpha)
    return divide(g, v.sqrt() + eps), [v]


def rmsprop_momentum(p, g, states, t, *, momentum, **options):
    """RMSprop whose normalised gradients go through a momentum buffer (torch.optim.RMSprop)."""
    normalised, [v] = rmsprop(p, g, states[:1], t, **options)
    buffer = momentum * states[1] + normalised
    return buffer, [v, buffer]


def adagrad(p, g, states, t, *, eps, weight_decay, **_):
    """J. Duchi, E. Hazan, Y. Singer, "Adaptive Subgradient Methods" (JMLR 12, 2011), figure 1 with a diagonal matrix;
    lr_decay, which is in the rate, eps and coupled weight decay as torch.optim.Adagrad."""
    g = g + weight_decay * p
    total = states[0] + g * g
    return divide(g, total.sqrt() + eps), [total]


def ademamix(p, g, states, t, *, beta1, beta2, beta3, alpha, eps, t_alpha, t_beta3, **_):
    """M. Pagliardini, P. Ablin, D. Grangier, "The AdEMAMix Optimizer" (arXiv:2409.03137), algorithm 1."""
    alpha, beta3 = ademamix_alpha(t, alpha, t_alpha), ademamix_beta3(t, beta1, beta3, t_beta3)
    m1, m2, v = _average(states[0], g, beta1), _average(states[1], g, beta3), _average(states[2], g * g, beta2)
    m1_hat = m1 / (1 - beta1**t)  # the slow average is not corrected
    return divide(m1_hat + alpha * m2, (v / (1 - beta2**t)).sqrt() + eps), [m1, m2, v]


def ademamix_alpha(t, alpha, t_alpha):
    """Algorithm 1's scheduler of alpha, equation 4; 0 steps are no schedule."""
    return min(t * alpha / t_alpha, alpha) if t_alpha else alpha


def ademamix_beta3(t, beta1, beta3, t_beta3):
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


def _average(x, new, beta):
    return beta * x + (1 - beta) * new


@dataclass(frozen=True)
class Update:
    """A row of the table of rules."""

    direction: Callable[..., Any]
    rate: Callable[..., float] = lambda t, lr, **_: lr  # what the direction is multiplied by
    decoupled: bool = False  # weight decay is no part of the direction

    def along(self, p, u, t, **options):
        """The parameter after a step along the direction."""
        decay = options["lr"] * options["weight_decay"] * p if self.decoupled else 0.0
        return p - self.rate(t, **options) * u - decay

    def __call__(self, p, g, states, t, **options):
        """The parameter and its states after a step."""
        u, states = self.direction(p, g, states, t, **options)
        return self.along(p, u, t, **options), states


_UPDATES = (
    Update(adam, rate=lambda t, lr, beta1, **_: lr / (1 - beta1**t), decoupled=True),
    Update(sgd),
    Update(momentum),
    Update(lion, decoupled=True),
    Update(rmsprop),
    Update(rmsprop_momentum),
    Update(adagrad, rate=lambda t, lr, lr_decay, **_: lr / (1 + (t - 1) * lr_decay)),
    Update(lamb, rate=lambda t, lr, trust, **_: lr * trust),
    Update(lars),
    Update(ademamix, decoupled=True),
    Update(signum, decoupled=True),
)
UPDATES = {update.direction.__name__: update for update in _UPDATES}

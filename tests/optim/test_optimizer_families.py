"""Every family of optimizers learns, in every precision, and does what its paper says or torch.optim does."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbops import optim
from bnbops.optim import AdamW8bit, PytorchLARS
from cases.optimizer_classes import CLASSES, WITH_8BIT, build, family
from cases.optimizers import MIXED, assert_same, params, set_grads, train
from reference.norms import lamb_trust, lars_trust, percentile_clip, squared_norm
from reference.rules import RULES

LR = 1e-2
names = pytest.mark.parametrize("name", CLASSES)


# ---- training --------------------------------------------------------------------------------------------------

RATES = {"LAMB": 2e-2, "LARS": 2.0, "PytorchLARS": 2.0, "SGD": 0.5, "Adagrad": 5e-2, "Lion": 3e-3}


@names
def test_trains(name):
    """A network learns a function; large weights (in 8 bits where the class has them) and small ones alike."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 64))
    x = torch.randn(128, 64)
    y = torch.tanh(x @ torch.randn(64, 64) / 8)
    optimizer = build(name, net.parameters(), lr=RATES.get(family(name), 5e-3))
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(net(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.25 * losses[0]


# How far apart 8-bit and 32-bit states are after 50 steps, of the way gone. A code is off by up to 7 % of its value, at
# random; those of RMSprop and Adagrad by more, since bitsandbytes gives their squares the signed codes, half of them
# unused; AdEMAMix divides two averages, and Lion looks at signs alone.
APART = {"SGD": 0.02, "LARS": 0.02, "RMSprop": 0.1, "Adagrad": 0.1, "Lion": 0.1, "AdEMAMix": 0.1}


@pytest.mark.parametrize("name", WITH_8BIT)
def test_8bit_follows_32bit(name):
    results = []
    for bits in (32, 8):
        p = params((64, 80))
        optimizer = build(name, p, lr=RATES.get(name, LR) / 5, optim_bits=bits)
        for _ in range(50):
            p[0].grad = p[0].detach() - 1
            optimizer.step()
        results.append(p[0].detach() - params((64, 80))[0].detach())
    assert (results[0] - results[1]).norm() / results[0].norm() < APART.get(name, 0.05)


# ---- against torch.optim ---------------------------------------------------------------------------------------

TORCHS = [
    *[("SGD", {"momentum": m, "weight_decay": w}) for m in (0, 0.9) for w in (0, 0.1)],
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
    ("SGD", {"momentum": 0, "dampening": 0.3}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    *[("RMSprop", {"momentum": m, "weight_decay": w}) for m in (0, 0.9) for w in (0, 0.1)],
    ("RMSprop", {"alpha": 0.9, "eps": 1e-4, "maximize": True}),
    *[("Adagrad", {"lr_decay": d, "weight_decay": w}) for d in (0, 0.1) for w in (0, 0.1)],
    ("Adagrad", {"initial_accumulator_value": 0.5, "eps": 1e-6, "maximize": True}),
]


@pytest.mark.parametrize(("name", "options"), TORCHS, ids=str)
def test_agrees_with_torch(name, options):
    """20 steps at rtol 1e-5; near zero, a parameter is measured by its longest step, a state by its largest element."""
    ours, theirs = params(*MIXED), params(*MIXED)
    optimizer = getattr(optim, name)(ours, lr=LR, **options)
    reference = getattr(torch.optim, name)(theirs, lr=LR, **options)
    longest = [torch.zeros_like(x) for x in theirs]
    for step in range(20):
        before = copy.deepcopy(theirs)
        train(ours, optimizer, range(step, step + 1))
        train(theirs, reference, range(step, step + 1))
        longest = [length.maximum((x - y).abs()) for length, x, y in zip(longest, theirs, before, strict=True)]
    for p, q, length in zip(ours, theirs, longest, strict=True):
        assert ((p - q).abs() <= 1e-5 * (q.abs() + length)).all()
        for key in optimizer.state[p].keys() - {"step"}:
            expected = reference.state[q][key]
            torch.testing.assert_close(
                optimizer.state[p][key], expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item()
            )


# ---- against the papers ----------------------------------------------------------------------------------------


def grads(shape: tuple[int, ...], seed: int) -> Tensor:
    """As `set_grads` sets them for one parameter, but of very different sizes, so that clipping has work."""
    p = nn.Parameter(torch.zeros(shape))
    set_grads([p], seed)
    return p.grad * 4.0 ** (seed % 3)


def followed(name: str, shape: tuple[int, ...], steps: int, **options: Any) -> Iterator[Tensor]:
    """The parameter after each step in float64, by the rules of tests/reference."""
    group = build(name, params((2, 2)), **options).param_groups[0]
    clipping, max_unorm = group["percentile_clipping"], group.get("max_unorm")
    rule = RULES[{"SGD": "momentum"}.get(name, name.lower())]
    rule_options = {**dict(zip(("beta1", "beta2", "beta3"), group.get("betas", ()), strict=False)), **group}
    rule_options = {key: rule_options[key] or 0 for key in rule.options}
    p, states = params(shape)[0].detach().double(), [torch.zeros(shape, dtype=torch.float64)] * len(rule.states)
    history: list[float] = []
    for t in range(1, steps + 1):
        g = grads(shape, t).double() * (-1 if group["maximize"] else 1)
        if clipping != 100:
            history, clip = percentile_clip(history, squared_norm(g), t, clipping)
            g = g * clip
        norm = math.sqrt(squared_norm(p))
        if name == "LAMB":
            others = {key: value for key, value in rule_options.items() if key not in ("lr", "trust")}
            direction, _ = RULES["lamb"].update.direction(p, g, states, t, **others)
            length = math.sqrt(squared_norm(direction))
            rule_options["trust"] = lamb_trust(norm, length, max_unorm, group["trust_clip"])
        elif name == "LARS":
            length, decay = math.sqrt(squared_norm(g)), group["weight_decay"]
            rule_options["trust"] = lars_trust(norm, length, decay, max_unorm, group["trust_clip"])
        p, states = rule.update(p, g, states, t, **rule_options)
        yield p


PAPERS = [
    ("Lion", {"weight_decay": 0.1}),
    ("Lion", {"maximize": True, "percentile_clipping": 30}),
    ("AdEMAMix", {}),
    ("AdEMAMix", {"t_alpha": 5, "t_beta3": 7, "weight_decay": 0.0}),
    ("LAMB", {}),
    ("LAMB", {"weight_decay": 0.1, "max_unorm": 0.3}),
    ("LAMB", {"weight_decay": 0.1, "adam_w_mode": False, "bias_correction": False, "maximize": True}),
    ("LAMB", {"max_unorm": 0.0}),
    ("LAMB", {"max_unorm": 2.0, "trust_clip": True, "percentile_clipping": 50}),
    ("LARS", {}),
    ("LARS", {"momentum": 0, "dampening": 0.5, "weight_decay": 0.1, "max_unorm": 0.5}),
    ("LARS", {"weight_decay": 0.1, "dampening": 0.5, "max_unorm": 3.0, "trust_clip": True}),
    ("LARS", {"nesterov": True, "max_unorm": 0.0}),
    ("LARS", {"maximize": True, "percentile_clipping": 20}),
    ("SGD", {"percentile_clipping": 0}),
    ("SGD", {"percentile_clipping": 99}),
]


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize(("name", "options"), PAPERS, ids=str)
def test_follows_the_paper(name, options, scaled):
    """10 steps at rtol 1e-5, of one large and one small parameter; a gradient scale of 8 changes nothing."""
    shapes = [(64, 80), (33,)]
    p = params(*shapes[:1]) + params(*shapes[1:])
    optimizer = build(name, p, lr=LR, **options)
    if scaled:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    if name == "LARS" and not options.get("momentum", 1):
        options = {**options, "dampening": 0}  # as in torch.optim.SGD, nothing is dampened without momentum
    expected = [list(followed(name, shape, 10, lr=LR, **options)) for shape in shapes]
    for t in range(1, 11):
        for x, shape in zip(p, shapes, strict=True):
            x.grad = grads(shape, t) * (8 if scaled else 1)
        optimizer.step()
        for x, trajectory in zip(p, expected, strict=True):
            torch.testing.assert_close(x.detach().double(), trajectory[t - 1], rtol=1e-5, atol=1e-5 * LR)


@pytest.mark.parametrize("name", ["LAMB", "LARS"])
def test_trust_ratio_of_zero_norms_is_one(name):
    """A parameter of zeros moves, and a gradient of zeros makes no NaN."""
    for param, gradient in ((torch.zeros(64, 80), torch.ones(64, 80)), (torch.ones(64, 80), torch.zeros(64, 80))):
        for bits in (8, 32):
            p = [nn.Parameter(param.clone())]
            p[0].grad = gradient.clone()
            build(name, p, lr=LR, optim_bits=bits).step()
            assert p[0].isfinite().all() and torch.equal(p[0], param) == (not gradient.any())


def test_the_largest_trust_ratio_is_finite():
    """A gradient near zero: the ratio would be beyond fp32."""
    p = [nn.Parameter(torch.ones(64, 80))]
    p[0].grad = torch.full((64, 80), 1e-44)
    p[0].grad[0, 0] = 0
    optimizer = build("LARS", p, lr=1e-3, momentum=0)
    optimizer.step()
    assert p[0].isfinite().all() and p[0][0, 0] == 1


def test_pytorch_lars():
    """bitsandbytes' class: momentum as in SGD, and the whole step no longer than max_unorm times the parameter."""
    options = {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "max_unorm": 0.02}
    p = params(*MIXED)
    optimizer = PytorchLARS(p, lr=LR, **options)
    expected, buffers = [x.detach().double() for x in p], [torch.zeros(x.shape, dtype=torch.float64) for x in p]
    for t in range(5):
        set_grads(p, t)
        for i, x in enumerate(expected):
            g = p[i].grad.double() + 0.1 * x
            buffers[i] = g if t == 0 else 0.9 * buffers[i] + 0.8 * g
            expected[i] = x - LR * min(1.0, 0.02 * x.norm() / buffers[i].norm()) * buffers[i]
        optimizer.step()
    for x, y in zip(p, expected, strict=True):
        torch.testing.assert_close(x.detach().double(), y, rtol=1e-5, atol=1e-5 * LR)
    before = copy.deepcopy(p)
    optimizer.found_inf = torch.tensor(1.0)
    train(p, optimizer, range(1))
    assert_same(p, before)


# ---- percentile clipping ---------------------------------------------------------------------------------------


@names
def test_percentile_clipping(name):
    """An outlier, here the largest of 100 norms, is scaled down to the second largest; others are not touched."""
    p, q = params(*MIXED), params(*MIXED)
    clipped, plain = build(name, p, lr=LR, percentile_clipping=98), build(name, q, lr=LR)
    for t in range(4):
        set_grads(p, 7)
        set_grads(q, 7)
        if t == 2:
            for x in p:
                x.grad *= 512
        clipped.step()
        plain.step()
    history = clipped.state[p[0]]["gnorm_vec"]
    assert history.shape == (100,) and history.dtype == torch.float32
    assert history.argmax() == 3 and history[3] == 512**2 * history[4]
    # 512 times is exact, and so is its inverse up to the rounding of the root and the quotient.
    for x, y in zip(p, q, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert all("gnorm_vec" not in state for state in plain.state.values())


def test_clipping_that_begins_later():
    """Nothing is clipped until there are enough norms to compare with."""
    p, q = params((64, 80)), params((64, 80))
    optimizer, plain = AdamW8bit(p), AdamW8bit(q)
    for parameters, opt in ((p, optimizer), (q, plain)):
        train(parameters, opt, range(3))
    optimizer.param_groups[0]["percentile_clipping"] = 10
    for parameters, opt in ((p, optimizer), (q, plain)):
        train(parameters, opt, range(3, 6))
    assert_same(p, q)
    assert optimizer.state[p[0]]["gnorm_vec"].isfinite().sum() == 3

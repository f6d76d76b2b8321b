"""The references themselves, against a second opinion: torch.optim, closed forms, and what the papers derive."""

import math

import pytest
import torch
from torch import Tensor

from bnbops.testing.references.rules import ademamix_alpha, ademamix_beta3, divide
from reference import norms
from reference.rounding import Rounded, rounded
from reference.rules import RULES

STEPS = 300


def gradients(p: Tensor, seed: int = 0) -> list[Tensor]:
    """Noise around a direction, growing and shrinking over the steps."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return [
        (direction + torch.randn(p.shape, generator=generator, dtype=torch.float64)) * math.exp(3 * math.sin(t / 20))
        for t in range(STEPS)
    ]


def start() -> Tensor:
    return torch.randn(50, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def run(rule: str, grads: list[Tensor], **options: float) -> Tensor:
    """The parameter after all gradients, in float64."""
    p, states = start(), [torch.zeros(50, dtype=torch.float64) for _ in RULES[rule].states]
    trust = {"trust": 1.0} if RULES[rule].trust else {}
    for t, g in enumerate(grads, start=1):
        p, states = RULES[rule].update(p, g, states, t, **trust | RULES[rule].options | options)
    return p


def run_torch(optimizer: type[torch.optim.Optimizer], grads: list[Tensor], **options: float) -> Tensor:
    p = start().requires_grad_()
    optimizer = optimizer([p], **options)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


SGD = [
    {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "nesterov": False},
    {"momentum": 0.5, "dampening": 0.0, "weight_decay": 0.1, "nesterov": True},
]
ADAM = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}
BETAS = {"beta1": 0.8, "beta2": 0.95}
RMSPROP = {"lr": 1e-2, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1}
SECOND_OPINIONS = [
    ("sgd", {"lr": 1e-2, "weight_decay": 0.1}, torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1}),
    *(("momentum", {"lr": 1e-2} | o, torch.optim.SGD, {"lr": 1e-2} | o) for o in SGD),
    # a trust ratio that stays the same is a part of the learning rate
    *(("lars", {"lr": 1e-1, "trust": 0.1} | o, torch.optim.SGD, {"lr": 1e-2} | o) for o in SGD),
    ("rmsprop", RMSPROP, torch.optim.RMSprop, RMSPROP),
    ("rmsprop_momentum", RMSPROP | {"momentum": 0.7}, torch.optim.RMSprop, RMSPROP | {"momentum": 0.7}),
    *(
        ("adagrad", o, torch.optim.Adagrad, o)
        for o in (
            {"lr": 1e-1, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0},
            {"lr": 1e-1, "lr_decay": 0.1, "eps": 1e-3, "weight_decay": 0.1},
        )
    ),
    ("adam", ADAM | BETAS, torch.optim.AdamW, ADAM | {"betas": (0.8, 0.95)}),
    # LAMB is then AdamW or, with coupled weight decay, Adam
    ("lamb", ADAM | BETAS | {"lr": 1e-1, "trust": 0.1}, torch.optim.AdamW, ADAM | {"betas": (0.8, 0.95)}),
    ("lamb", ADAM | BETAS | {"adam_w_mode": False}, torch.optim.Adam, ADAM | {"betas": (0.8, 0.95)}),
    # AdEMAMix without its slow average is AdamW
    ("ademamix", ADAM | BETAS | {"alpha": 0.0}, torch.optim.AdamW, ADAM | {"betas": (0.8, 0.95)}),
]


@pytest.mark.parametrize(("rule", "options", "optimizer", "torch_options"), SECOND_OPINIONS)
def test_many_steps_agree_with_torch(rule, options, optimizer, torch_options):
    grads = gradients(start())
    ours, theirs = run(rule, grads, **options), run_torch(optimizer, grads, **torch_options)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_lamb_without_bias_correction_is_adam_of_other_rates():
    """m / (sqrt(v) + eps) is Adam's fraction with the corrections undone: of lr and eps that vary with the step."""
    p, options = start(), RULES["lamb"].options | {"weight_decay": 0.0, "bias_correction": False, "eps": 1e-3}
    g = gradients(p)[0]
    states = [torch.full_like(p, 0.3), torch.full_like(p, 0.2)]
    for t in (1, 2, 50):
        correction1, correction2 = 1 - options["beta1"] ** t, (1 - options["beta2"] ** t) ** 0.5
        rates = {"lr": options["lr"] * correction1 / correction2, "eps": options["eps"] / correction2}
        adam = {name: options[name] for name in RULES["adam"].options} | rates
        ours, _ = RULES["lamb"].update(p, g, states, t, trust=1.0, **options)
        theirs, _ = RULES["adam"].update(p, g, states, t, **adam)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


def test_lion_moves_by_lr_towards_the_sign_of_its_closed_form():
    """c_t = beta1 * m_{t-1} + (1 - beta1) * g_t, where m is a plain average of past gradients."""
    grads, options = gradients(start())[:100], {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.0}
    expected = start()
    for t, g in enumerate(grads):
        m = sum(((1 - 0.95) * 0.95 ** (t - 1 - i) * grads[i] for i in range(t)), torch.zeros_like(g))
        expected -= 1e-2 * torch.sign(0.9 * m + 0.1 * g)
    torch.testing.assert_close(run("lion", grads, **options), expected, rtol=0, atol=1e-12)


def test_lion_decays_weights_apart_from_the_sign():
    p = start()
    zero = torch.zeros_like(p)
    decayed, _ = RULES["lion"].update(p, zero, [zero], 1, lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.5)
    torch.testing.assert_close(decayed, 0.95 * p)


# ---- AdEMAMix --------------------------------------------------------------------------------------------------


def half_life(beta: float) -> float:
    """Steps until a gradient's weight in an average has halved (arXiv:2409.03137, appendix A.1)."""
    return math.log(0.5) / math.log(beta)


def closed_form_ademamix(grads: list[Tensor], options: dict) -> Tensor:
    """Algorithm 1 with the averages written out as weighted sums of all gradients, one parameter step after another."""
    p, beta3s = start(), []
    for t in range(1, len(grads) + 1):
        beta3s.append(ademamix_beta3(t, options["beta1"], options["beta3"], options["t_beta3"]))
        fast, slow, square = (torch.zeros_like(p) for _ in range(3))
        slow_weight = 1.0
        for age in range(t):
            g = grads[t - 1 - age]
            fast += (1 - options["beta1"]) * options["beta1"] ** age * g
            square += (1 - options["beta2"]) * options["beta2"] ** age * g**2
            slow += slow_weight * (1 - beta3s[t - 1 - age]) * g
            slow_weight *= beta3s[t - 1 - age]
        fast, square = fast / (1 - options["beta1"] ** t), square / (1 - options["beta2"] ** t)
        alpha = options["alpha"] * min(1.0, t / options["t_alpha"]) if options["t_alpha"] else options["alpha"]
        p = p - options["lr"] * ((fast + alpha * slow) / (square**0.5 + options["eps"]) + options["weight_decay"] * p)
    return p


@pytest.mark.parametrize(("t_alpha", "t_beta3"), [(0, 0), (60, 0), (0, 60), (50, 70), (500, 500)])
def test_ademamix_agrees_with_its_closed_form(t_alpha, t_beta3):
    options = RULES["ademamix"].options | {"beta3": 0.99, "t_alpha": t_alpha, "t_beta3": t_beta3}
    grads = gradients(start())[:100]
    torch.testing.assert_close(
        run("ademamix", grads, **options), closed_form_ademamix(grads, options), rtol=1e-12, atol=0
    )


def test_ademamix_half_life_grows_linearly():
    """What equation 5 was derived from: from beta1's half-life to beta3's in equal steps."""
    first, last = half_life(0.9), half_life(0.9999)
    for t in range(1, 1000):
        expected = first + (last - first) * t / 1000
        assert half_life(ademamix_beta3(t, 0.9, 0.9999, 1000)) == pytest.approx(expected, rel=1e-9)


def test_ademamix_schedules_end_at_their_values():
    for t in (1000, 1001, 10**6):
        assert ademamix_alpha(t, 5.0, 1000) == 5.0
        assert ademamix_beta3(t, 0.9, 0.9999, 1000) == 0.9999
    assert ademamix_alpha(1, 5.0, 1000) == 0.005
    assert ademamix_alpha(3, 5.0, 0) == 5.0 and ademamix_beta3(3, 0.9, 0.9999, 0) == 0.9999


def test_ademamix_beta3_near_the_ends_of_its_range():
    """From beta1 = 0 the schedule is the limit of small beta1; it never passes beta3, even where beta1 is larger."""
    assert ademamix_beta3(3, 0.0, 0.99, 10) == pytest.approx(ademamix_beta3(3, 1e-300, 0.99, 10), rel=1e-3)
    assert ademamix_beta3(3, 0.95, 0.9, 10) == 0.9
    assert ademamix_beta3(3, 0.9, 0.0, 10) == 0.0


# ---- norms -----------------------------------------------------------------------------------------------------


def test_squared_norm_is_that_of_the_finite_elements():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert norms.squared_norm(x) == pytest.approx(torch.linalg.vector_norm(x.double()).item() ** 2, rel=1e-14)
    assert norms.squared_norm(torch.tensor([3.0, math.inf, -4.0, math.nan, -math.inf])) == 25.0


def test_lamb_moves_a_parameter_by_its_own_length():
    """Section 3 of the paper: the trust ratio normalises the direction and scales it by |x|."""
    p, options = start(), RULES["lamb"].options
    g, states = gradients(p)[0], [torch.full_like(p, 0.3), torch.full_like(p, 0.2)]
    still, _ = RULES["lamb"].update(p, g, states, 5, trust=1.0, **options)
    u_norm = ((p - still) / options["lr"]).norm().item()
    moved, _ = RULES["lamb"].update(p, g, states, 5, trust=norms.lamb_trust(p.norm().item(), u_norm), **options)
    assert (moved - p).norm().item() == pytest.approx(options["lr"] * p.norm().item(), rel=1e-12)


def test_lars_does_not_see_the_scale_of_a_gradient():
    """Section 4 of the paper: without weight decay the step depends on the gradient's direction alone."""
    p, options = start(), RULES["lars"].options | {"weight_decay": 0.0}
    g, buffer = gradients(p)[0], torch.zeros_like(p)
    results = []
    for scale in (1.0, 1e6):
        trust = norms.lars_trust(p.norm().item(), (scale * g).norm().item(), 0.0)
        moved, _ = RULES["lars"].update(p, scale * g, [buffer], 1, trust=trust, **options)
        results.append(moved)
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)
    assert (results[0] - p).norm().item() == pytest.approx(options["lr"] * p.norm().item(), rel=1e-12)


def test_trust_ratios_at_their_ends():
    assert norms.lamb_trust(8.0, 2.0) == 4.0 and norms.lamb_trust(8.0, 2.0, trust_clip=True) == 1.0
    assert norms.lamb_trust(1.0, 2.0, trust_clip=True) == 0.5 and norms.lamb_trust(8.0, 2.0, max_unorm=0.02) == 0.08
    assert norms.lars_trust(8.0, 3.0, 0.5) == 8 / 7 and norms.lars_trust(8.0, 3.0, 0.5, trust_clip=True) == 1.0
    for trust in (norms.lamb_trust, lambda *a, **k: norms.lars_trust(*a, 0.1, **k)):
        assert trust(0.0, 2.0) == 1.0 and trust(8.0, 2.0, max_unorm=0.0) == 1.0
    assert norms.lamb_trust(8.0, 0.0) == 1.0 and norms.lars_trust(8.0, 0.0, 0.0) == 1.0


def test_percentile_clipping_holds_gradients_to_their_history():
    """A gradient ten times as long as any before is cut to the chosen percentile of the last hundred."""
    history, clip = norms.percentile_clip([0.0] * 100, 4.0, 1, 5)
    assert history == [4.0] * 100 and clip == 1.0
    for t in range(2, 101):
        history, clip = norms.percentile_clip(history, float(t), t, 5)
    # 2 .. 100, and the first step's 4 where t % 100 is 1
    assert sorted(history) == sorted([4.0, *map(float, range(2, 101))])
    history, clip = norms.percentile_clip(history, 1e6, 101, 50)
    assert 1e6 in history and 4.0 in history and len(history) == 100
    assert clip == pytest.approx(math.sqrt(52.0 / 1e6))
    assert norms.percentile_clip(history, 0.0, 102, 50)[1] == 1.0


# ---- the bounds on rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_fp32_stays_within_its_bound(rule):
    """The plain rule in fp32 is never farther from float64 than `Rounded` says, and not always much nearer."""
    generator = torch.Generator().manual_seed(0)
    count = 100_000
    p, g = (torch.randn(count, generator=generator) for _ in range(2))
    states = [torch.randn(count, generator=generator).square() * 0.1 for _ in RULES[rule].states]
    options = RULES[rule].options | ({"trust": 0.7} if RULES[rule].trust else {})
    exact = RULES[rule].update(rounded(p), rounded(g), [rounded(s) for s in states], 7, **options)
    plain = RULES[rule].update(p, g, states, 7, **options)
    for bound, actual in zip([exact[0], *exact[1]], [plain[0], *plain[1]], strict=True):
        share = (actual.double() - bound.value).abs() / bound.error
        assert 0.2 < share.max() <= 1


def test_zeros_are_certain():
    """0 * x, 0 + 0 and 0 / 0 in fp32 are exact, so that a bound around them is no licence."""
    zero, x = rounded(torch.zeros(1)), rounded(torch.tensor([0.3]))
    for result in (zero * x, 0.1 * zero, zero + zero, divide(zero, zero), zero.sqrt(), zero.sign(), zero / x):
        assert result.value == 0 and result.error == 0


def test_doubtful_signs_and_divisions_are_owned_up_to():
    doubtful = Rounded(torch.tensor([1e-9], dtype=torch.float64), torch.tensor([1e-8], dtype=torch.float64))
    assert doubtful.sign().error == 2
    assert (rounded(1.0) / doubtful).error == math.inf
    assert (rounded(0.0) * (rounded(1.0) / doubtful)).error == 0

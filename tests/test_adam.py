"""torch.ops.bnbops.adam_step_ against the papers (reference/adam.py)."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference import quantize as ref
from reference.adam import Hyper, adam, half_ulp, state_absmax, state_normalised
from reference.group import SIGNED, UNSIGNED, Group, append_state, op_options, random_group

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODECS = [(32, "rows"), (8, "rows"), (8, "flat")]
SHAPES = [(64, 64), (3, 256), (5, 257), (7, 255), (1, 513), (2, 1), (17, 512), (4, 3, 5, 7), (300,), (1,), (2, 3, 400)]
ROUNDING = 2**-24  # relative error of one fp32 operation
TINY = 2**-149
MAX = torch.finfo(torch.float32).max


def check_step(before: Group, after: Group, h: Hyper, scale: float = 1.0) -> None:
    """One step is the paper's, in float64, to within the rounding of a handful of fp32 operations."""
    for i in range(len(before.params)):
        step = int(before.steps[i].item()) + 1
        assert after.steps[i].item() == step
        p, g = before.params[i].double(), before.grads[i].double() / scale
        m, v = (x.double() for x in before.moments(i))
        p_new, m_new, v_new = adam(p, g, m, v, step, h)

        # Rounding errors are relative to the terms of a sum, not to the sum, which may cancel.
        g = torch.where(g.isfinite(), g, 0.0)
        m_error = 3 * ROUNDING * (m.abs() + (1 - h.beta1) * g.abs()) + TINY
        v_error = 4 * ROUNDING * v_new + TINY
        denominator = (v_new / (1 - h.beta2**step)).sqrt() + h.eps
        rate = torch.where(denominator > 0, h.lr / (1 - h.beta1**step) / denominator, 0.0)
        p_error = 8 * ROUNDING * (p.abs() + (p_new - p).abs()) + 2 * rate * m_error
        dtype = before.params[i].dtype
        if dtype != torch.float32:
            p_error += half_ulp(p_new, dtype)

        assert after.params[i].dtype == dtype
        assert_within(after.params[i], p_new, p_error, "parameter")
        if before.exp_avg_absmax:
            check_codes(after.exp_avg[i], after.exp_avg_absmax[i], m_new, m_error, SIGNED)
            check_codes(after.exp_avg_sq[i], after.exp_avg_sq_absmax[i], v_new, v_error, UNSIGNED)
        else:
            assert_within(after.exp_avg[i], m_new, m_error, "exp_avg")
            assert_within(after.exp_avg_sq[i], v_new, v_error, "exp_avg_sq")


def assert_within(actual: Tensor, expected: Tensor, error: Tensor, what: str) -> None:
    actual = actual.double()
    off = torch.where(actual == expected, 0.0, (actual - expected).abs())
    assert (off <= error).all(), f"{what}: off by {(off / error).max():.3g} times what rounding explains"


def check_codes(codes: Tensor, absmax: Tensor, x: Tensor, error: Tensor, code: Tensor) -> None:
    """`codes` are the nearest to `x` over the absmax of its block, for an `x` known to within `error`."""
    block_error = state_absmax(error, absmax)
    assert_within(absmax, state_absmax(x, absmax).double(), block_error.double(), "absmax")
    normalised = state_normalised(x, absmax)
    scale = of_each_element(absmax, x)
    error = error + normalised.abs() * of_each_element(block_error, x)
    slack = 10 * 2**-23 * normalised.abs() + torch.where(scale > 0, error / scale, 0.0)  # see test_quantize.SLACK
    ref.assert_nearest(normalised, codes, code, slack=slack)


def of_each_element(absmax: Tensor, x: Tensor) -> Tensor:
    """Each block's number at every element of `x`, in float64."""
    repeated = absmax.double().repeat_interleave(256, dim=-1)
    if absmax.ndim == 1:
        return repeated[: x.numel()].view(x.shape)
    return repeated[:, : x.numel() // max(len(x), 1)].reshape(x.shape)


# ---- one step against the paper --------------------------------------------------------------------------------


@pytest.mark.parametrize("grads", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_matches_the_paper(codec, dtype, grads):
    """Awkward rows, per-tensor steps from the first to the ten thousandth, every dtype and codec."""
    bits, layout = codec
    h = Hyper(lr=3e-3, weight_decay=0.1)
    grad_dtype = torch.float32 if grads == "fp32" else dtype
    group = random_group(
        SHAPES, bits=bits, layout=layout, dtype=dtype, grad_dtype=grad_dtype, steps=(0, 1, 6, 999, 10_000)
    )
    before = group.clone()
    group.step(h)
    check_step(before, group, h)
    assert all(torch.equal(a, b) for a, b in zip(before.grads, group.grads, strict=True))


HYPERS = {
    "plain": Hyper(),
    "weight decay": Hyper(lr=1e-2, weight_decay=0.3),
    "maximize": Hyper(maximize=True, weight_decay=0.1),
    "large lr": Hyper(lr=10.0),
    "lr 0": Hyper(lr=0.0, weight_decay=0.1),
    "eps 0": Hyper(eps=0.0),
    "large eps": Hyper(eps=0.5),
    "no momentum": Hyper(beta1=0.0),
    "no momenta": Hyper(beta1=0.0, beta2=0.0),
    "other betas": Hyper(beta1=0.95, beta2=0.98),
    "long memory": Hyper(beta1=0.99, beta2=0.99999),
}


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("name", HYPERS)
def test_hyperparameters(name, codec):
    group = random_group([(5, 300), (700,)], bits=codec[0], layout=codec[1], steps=(0, 40))
    before = group.clone()
    group.step(HYPERS[name])
    check_step(before, group, HYPERS[name])


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_every_width_up_to_two_blocks(codec, guard):
    """Sweeps tails and misalignments, everything inside guarded memory."""
    h = Hyper(weight_decay=0.01)
    widths = [*range(1, 80), *range(250, 262), *range(505, 516)]
    group = random_group([(2, width) for width in widths], bits=codec[0], layout=codec[1]).map(guard)
    before = group.clone()
    group.step(h)
    check_step(before, group, h)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 200])
def test_any_number_of_tensors(count, codec):
    shapes = [(1 + i % 7, 1 + 37 * i % 300) for i in range(count)]
    group = random_group(shapes, bits=codec[0], layout=codec[1], steps=range(11))
    before = group.clone()
    group.step(Hyper())
    check_step(before, group, Hyper())


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 300), (3, 0, 2)], ids=str)
def test_empty_tensors_only_count_steps(shape, codec):
    group = random_group([shape, (2, 3), shape], bits=codec[0], layout=codec[1], steps=(0, 3))
    before = group.clone()
    group.step(Hyper())
    check_step(before, group, Hyper())


@pytest.mark.parametrize("codec", [(32, "rows"), (8, "flat")], ids=str)
def test_scalar_parameter(codec):
    group = random_group([()], bits=codec[0], layout=codec[1])
    before = group.clone()
    group.step(Hyper())
    check_step(before, group, Hyper())


def test_lr_of_either_precision():
    """lr is a tensor, fp64 or fp32."""
    results = []
    for dtype in (torch.float64, torch.float32):
        group = random_group([(3, 100)], bits=32)
        options = op_options(Hyper()) | {"lr": torch.tensor(2**-7, dtype=dtype)}
        torch.ops.bnbops.adam_step_(*group.lists().values(), **options)
        results.append(group.params[0])
    assert torch.equal(*results)


# ---- scaling, overflow, non-finite values ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_grad_scale_divides_the_gradient(codec, dtype):
    group = random_group([(5, 300), (64,)], bits=codec[0], layout=codec[1], dtype=dtype)
    before = group.clone()
    group.step(Hyper(), grad_scale=torch.tensor([3.0]), found_inf=torch.tensor([0.0]))
    check_step(before, group, Hyper(), scale=3.0)


@pytest.mark.parametrize("found", [1.0, 5.0])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_found_inf_skips_everything(codec, found):
    group = random_group([(5, 300), (64,)], bits=codec[0], layout=codec[1])
    before = group.clone()
    group.step(Hyper(weight_decay=0.1), grad_scale=torch.tensor(2.0), found_inf=torch.tensor(found))
    assert_same(before, group)


def assert_same(a: Group, b: Group) -> None:
    for name, tensors in a.lists().items():
        for i, (x, y) in enumerate(zip(tensors, b.lists()[name], strict=True)):
            assert torch.equal(x, y), f"{name}[{i}] differs"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_non_finite_gradient_elements_are_left_out(codec, dtype, value):
    """They keep p, m, v; every other element of their block gets its step. `check_step` knows both."""
    h = Hyper(weight_decay=0.1)
    group = random_group([(3, 300), (256,), (2, 5)], bits=codec[0], layout=codec[1], dtype=dtype)
    for grad in group.grads:
        grad.view(-1)[::7] = value
    group.grads[2].fill_(value)
    before = group.clone()
    group.step(h)
    check_step(before, group, h)
    for old, new in zip(before.params, group.params, strict=True):
        assert torch.equal(old.view(-1)[::7], new.view(-1)[::7])
    if codec[0] == 32:
        for old, new in zip(before.exp_avg + before.exp_avg_sq, group.exp_avg + group.exp_avg_sq, strict=True):
            assert torch.equal(old.view(-1)[::7], new.view(-1)[::7])


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_zero_gradients_from_the_start(codec, eps):
    """0 / 0 is no step: with eps = 0 nothing moves but by weight decay, and zero blocks stay zero."""
    h = Hyper(eps=eps, weight_decay=0.1)
    group = fresh_group([(3, 300), (64,)], codec)
    for _ in range(3):
        before = group.clone()
        group.step(h)
        check_step(before, group, h)
    assert all((x == 0).all() for i in range(2) for x in group.moments(i))


def fresh_group(shapes: list[tuple[int, ...]], codec: tuple[int, str], dtype: torch.dtype = torch.float32) -> Group:
    """Random parameters before their first step, with zero gradients."""
    group = replace(random_group(shapes, bits=32, dtype=dtype), exp_avg=[], exp_avg_sq=[])
    for p in group.params:
        append_state(group, torch.zeros(p.shape), torch.zeros(p.shape), *codec)
    group.steps = [torch.zeros(()) for _ in shapes]
    return group.with_grads([torch.zeros_like(p) for p in group.params])


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.5), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_huge_gradients_do_no_harm(codec, eps, betas):
    """Where squares overflow: nothing becomes NaN, no step exceeds Adam's bound, and other blocks do not notice."""
    h = Hyper(lr=1e-2, beta1=betas[0], beta2=betas[1], eps=eps)
    group = fresh_group([(3, 300)], codec)
    calm, calm_grad = group.clone(), random_group([(3, 300)], bits=32).grads[0]
    grad = calm_grad.clone()
    grad[0, :240:3] = torch.tensor([1e19, -1e25, MAX, -MAX, 1.0]).repeat(16)
    grad[1, 5] = MAX
    for sign in (1, -1, 1, 1, -1, 1):
        before = group.params[0].clone()
        group, calm = group.with_grads([sign * grad]), calm.with_grads([sign * calm_grad])
        group.step(h)
        calm.step(h)
        # Kingma & Ba, section 2.1: lr * max(1, (1 - beta1) / sqrt(1 - beta2)), here 3.2 lr at most
        assert ((group.params[0] - before).abs() <= 4 * h.lr).all()
        assert not any(x.isnan().any() for x in group.moments(0))
        assert all(x.isfinite().all() for x in group.exp_avg_absmax + group.exp_avg_sq_absmax)
    assert torch.equal(group.params[0][2], calm.params[0][2])
    for x, y in zip(group.moments(0), calm.moments(0), strict=True):
        assert torch.equal(x[2], y[2])


@pytest.mark.parametrize("magnitude", [1e-18, 1e-20, 1e-22, 1e-30, 1e-38, 1e-42])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_tiny_gradients_turn_nothing_into_nan(codec, magnitude):
    """Squares become denormal or zero. Without eps, no step may exceed what zero second moments would allow: none."""
    group = fresh_group([(2, 300)], codec)
    group = group.with_grads([torch.full((2, 300), magnitude)])
    for _ in range(3):
        group.step(Hyper(eps=0.0))
        assert group.params[0].isfinite().all()
        assert not any(x.isnan().any() for x in group.moments(0))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_steps_shrink_with_gradient_history(codec):
    """Ten steps in a row, each held to the paper from the state the step before left."""
    group = fresh_group([(4, 300), (100, 77)], codec)
    generator = torch.Generator().manual_seed(5)
    h = Hyper(lr=1e-2, weight_decay=0.05)
    for _ in range(10):
        group = group.with_grads([torch.randn(p.shape, generator=generator) * 0.01 for p in group.params])
        before = group.clone()
        group.step(h)
        check_step(before, group, h)


# ---- memory and threads ----------------------------------------------------------------------------------------

VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every other column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "padded rows": lambda x: torch.nn.functional.pad(x, (3, 5))[:, 3:-5],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strided_gradients_work(view, codec, dtype):
    group = random_group([(30, 40), (5, 300)], bits=codec[0], layout=codec[1], dtype=dtype)
    strided = group.clone().with_grads([VIEWS[view](g) for g in group.grads])
    assert not any(g.is_contiguous() for g in strided.grads)
    group.step(Hyper())
    strided.step(Hyper())
    assert_same(group, strided)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_expanded_gradient_works(codec):
    """loss.sum().backward() leaves a gradient of stride 0."""
    group = random_group([(30, 40)], bits=codec[0], layout=codec[1])
    expanded = group.clone().with_grads([torch.tensor(0.5).expand(30, 40)])
    group.with_grads([torch.full((30, 40), 0.5)]).step(Hyper())
    expanded.step(Hyper())
    assert_same(group.with_grads(expanded.grads), expanded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_threads_change_no_bit(codec, dtype):
    shapes = [(300, 700), (3, 70_000), (5, 3), (300,), (1, 1), *[(64, 33)] * 20]
    group = random_group(shapes, bits=codec[0], layout=codec[1], dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(group.clone())
        for _ in range(2):
            results[-1].step(Hyper(weight_decay=0.1))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_fp32_and_low_precision_gradients_agree():
    """A bf16 gradient and the same values in fp32 give the same bits."""
    low = random_group([(7, 300)], bits=8, dtype=torch.bfloat16)
    high = low.clone().with_grads([g.float() for g in low.grads])
    low.step(Hyper())
    high.step(Hyper())
    assert_same(low.with_grads(high.grads), high)

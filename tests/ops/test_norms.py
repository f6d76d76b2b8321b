"""squared_norms and lamb_squared_norms against plain sums (reference/norms.py)."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from cases.backends import on_every_backend
from cases.rules import CODECS, DTYPES, usual
from reference import norms
from reference.group import Group, op_options, random_group
from reference.rounding import UNIT, rounded
from reference.rules import lamb_direction
from reference.step import gradient

MAX = torch.finfo(torch.float32).max
SHAPES = [(64, 64), (5, 257), (1, 513), (2, 1), (17, 512), (4, 3, 5, 7), (300,), (1,), (), (0,), (3, 0), (9, 70_001)]


def assert_sums(actual: Tensor, expected: list[float], errors: list[float], counts: list[int]) -> None:
    """Sums of `count` non-negative terms that are known to within `error`, added up in float64 in some order."""
    assert actual.dtype == torch.float64 and actual.shape == (len(expected),)
    for x, y, error, count in zip(actual.tolist(), expected, errors, counts, strict=True):
        assert abs(x - y) <= error + count * 2**-53 * y, (x, y)


def check_squared_norms(tensors: list[Tensor]) -> None:
    actual = torch.ops.bnbops.squared_norms(tensors)
    expected = [norms.squared_norm(x) for x in tensors]  # squares of fp32 are exact in float64
    assert_sums(actual, expected, [0.0] * len(tensors), [x.numel() for x in tensors])


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Over many decades."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    return (torch.randn(shape, generator=generator) * 10 ** (-4 * torch.rand(shape, generator=generator))).to(dtype)


# ---- squared_norms ---------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_norms_are_sums_of_squares(dtype):
    tensors = [values(*shape, dtype=dtype) for shape in SHAPES]
    before = [x.clone() for x in tensors]
    check_squared_norms(tensors)
    assert all(torch.equal(x, y) for x, y in zip(before, tensors, strict=True))


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_norms_of_every_small_size(dtype):
    """Each inside a larger buffer of large values: reading one element too many would show."""
    buffer = torch.full((3000,), 1e4, dtype=dtype)
    tensors = []
    for offset, size in enumerate([*range(140), *range(250, 262), *range(1020, 1030), *range(2040, 2052)]):
        start = offset % 67
        x = buffer.clone()[start : start + size]
        tensors.append(x.copy_(values(size)))
    check_squared_norms(tensors)


@on_every_backend
def test_squared_norms_of_mixed_dtypes_and_strides():
    x = values(30, 40)
    tensors = [x, x.bfloat16(), x.half(), x.t(), x[:, ::3], x[3].expand(7, 40), x.flip(0), x.view(2, 15, 40)[:, 3]]
    check_squared_norms(tensors)


@on_every_backend
@pytest.mark.parametrize("count", [1, 2, 500])
def test_squared_norms_of_any_number_of_tensors(count):
    check_squared_norms([values(i % 40, 1 + i % 7) for i in range(count)])


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_elements_do_not_count(dtype):
    x = values(3, 1000, dtype=dtype)
    for start, value in enumerate((math.nan, math.inf, -math.inf)):
        x.view(-1)[start::7] = value
    check_squared_norms([x, torch.full((100,), math.nan, dtype=dtype), values(50, dtype=dtype)])


@on_every_backend
def test_squares_beyond_fp32_are_summed():
    x = torch.tensor([MAX, -MAX, 1e-30, 1e-45, -1e-45, 0.0, -0.0])
    check_squared_norms([x, x[2:], x[3:], x[5:], torch.full((5000,), MAX)])


def test_one_tensor_has_the_same_bits_alone():
    """And for any number of threads, and strided."""
    tensors = [values(*shape) for shape in [(3, 100_000), (5, 7), (1000, 301), (4096,)]]
    expected = torch.ops.bnbops.squared_norms(tensors)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(torch.ops.bnbops.squared_norms(tensors), expected)
    for x, norm in zip(tensors, expected, strict=True):
        strided = x.repeat_interleave(2, dim=-1)[..., ::2]
        assert torch.equal(torch.ops.bnbops.squared_norms([strided]), norm[None])


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.complex64], ids=str)
def test_squared_norms_refuses_other_dtypes(dtype):
    message = r"bnbops::squared_norms: tensors\[1\] must be float32, bfloat16 or float16"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bnbops.squared_norms([torch.ones(3), torch.ones(3).to(dtype)])


# ---- lamb_squared_norms ----------------------------------------------------------------------------------------


def lamb_squared_norms(group: Group, options: dict[str, Any], **scaling: bool | Tensor) -> Tensor:
    return torch.ops.bnbops.lamb_squared_norms(*group.lists().values(), **op_options(options), **scaling)


def check_lamb_norms(group: Group, options: dict[str, Any] | None = None, **scaling: bool | Tensor) -> None:
    """The squares of the reference's direction, where the gradient is finite; nothing changes."""
    options = options or usual("lamb")
    before = group.clone()
    actual = lamb_squared_norms(group, options, **scaling)
    assert all(
        torch.equal(x.nan_to_num(), y.nan_to_num())
        for xs, ys in zip(before.lists().values(), group.lists().values(), strict=True)
        for x, y in zip(xs, ys, strict=True)
    )
    without_lr = {name: value for name, value in options.items() if name != "lr"}
    expected, errors = [], []
    for i, p in enumerate(group.params):
        g, finite = gradient(group, i, **scaling)
        states, t = [rounded(x) for x in group.state_values(i)], int(group.steps[i].item()) + 1
        u, _ = lamb_direction(rounded(p), g, states, t, **without_lr)
        square = u.value**2 * finite
        expected.append(math.fsum(square.flatten().tolist()))
        error = (2 * u.value.abs() + u.error) * u.error + UNIT * u.value**2
        errors.append((error * finite).sum().item())
    assert_sums(actual, expected, errors, [p.numel() for p in group.params])


@on_every_backend
@pytest.mark.parametrize("grads", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_lamb_norms_are_those_of_the_update(codec, dtype, grads):
    grad_dtype = torch.float32 if grads == "fp32" else dtype
    shapes = [shape for shape in SHAPES[:-1] if shape != ()]
    group = random_group(
        "lamb", shapes, **CODECS[codec], dtype=dtype, grad_dtype=grad_dtype, steps=(0, 1, 6, 999, 10_000)
    )
    check_lamb_norms(group)


LAMB_VARIANTS = {
    "no weight decay": {"weight_decay": 0.0},
    "coupled weight decay": {"adam_w_mode": False, "weight_decay": 0.3},
    "no bias correction": {"bias_correction": False},
    "eps 0": {"eps": 0.0},
    "no averages": {"beta1": 0.0, "beta2": 0.0},
    "another lr": {"lr": 10.0},  # changes nothing
}


@on_every_backend
@pytest.mark.parametrize("variant", LAMB_VARIANTS)
@pytest.mark.parametrize("codec", CODECS)
def test_lamb_norms_with_options(codec, variant):
    group = random_group("lamb", [(5, 300), (700,)], **CODECS[codec], steps=(0, 40))
    check_lamb_norms(group, usual("lamb", **LAMB_VARIANTS[variant]))


@pytest.mark.parametrize("codec", CODECS)
def test_lamb_norms_of_scaled_gradients(codec):
    group = random_group("lamb", [(5, 300), (700,), (3, 3)], **CODECS[codec], steps=(0, 40))
    check_lamb_norms(group, maximize=True, grad_scale=torch.tensor([3.0]), clip=torch.tensor([0.1, 1.0, 0.0]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("codec", CODECS)
def test_lamb_norms_leave_out_what_the_step_leaves_out(codec, value):
    group = random_group("lamb", [(3, 300), (256,), (2, 5)], **CODECS[codec])
    for grad in group.grads:
        grad.view(-1)[::7] = value
    group.grads[2].fill_(value)
    check_lamb_norms(group)


@on_every_backend
@pytest.mark.parametrize("codec", CODECS)
def test_lamb_norms_of_nothing(codec):
    assert lamb_squared_norms(Group("lamb"), usual("lamb")).shape == (0,)
    check_lamb_norms(random_group("lamb", [(0,), (2, 3), (3, 0)], **CODECS[codec]))


@pytest.mark.parametrize("codec", CODECS)
def test_lamb_norms_have_the_same_bits_alone(codec):
    """And for any number of threads, and from a strided gradient."""
    shapes = [(100, 301), (2, 40_000), (5, 3), (300,)]
    group = random_group("lamb", shapes, **CODECS[codec])
    expected = lamb_squared_norms(group, usual("lamb"))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(lamb_squared_norms(group, usual("lamb")), expected)
    strided = group.with_grads([g.repeat_interleave(2, dim=-1)[..., ::2] for g in group.grads])
    assert torch.equal(lamb_squared_norms(strided, usual("lamb")), expected)
    for i, norm in enumerate(expected):
        alone = Group("lamb", *([tensors[i]] for tensors in (group.params, group.grads)), steps=[group.steps[i]])
        alone.states = {name: [tensors[i]] for name, tensors in group.states.items()}
        alone.absmax = {name: tensors[i : i + 1] for name, tensors in group.absmax.items()}
        assert torch.equal(lamb_squared_norms(alone, usual("lamb")), norm[None])


@on_every_backend
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"beta1": 1.0}, "beta1 must be in [0, 1)"),
        ({"eps": -1.0}, "eps must be finite and not negative"),
        ({"lr": math.nan}, "lr must be finite"),
    ],
)
def test_lamb_norms_refuse_bad_options(changed, message):
    group = random_group("lamb", [(3, 4)], bits=32)
    with pytest.raises(RuntimeError, match=re.escape(f"bnbops::lamb_squared_norms: {message}")):
        lamb_squared_norms(group, usual("lamb") | changed)


def test_lamb_norms_refuse_lists_of_other_lengths():
    group = random_group("lamb", [(3, 4), (5,)], bits=32)
    group.grads.pop()
    with pytest.raises(RuntimeError, match="bnbops::lamb_squared_norms: grads has 1 tensors for 2 params"):
        lamb_squared_norms(group, usual("lamb"))

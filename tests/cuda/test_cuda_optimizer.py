"""The optimizer and norm kernels of CUDA give the CPU kernels' bits, whatever shares a launch."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnbops import facts
from cases import backends
from cases.optimizer_classes import WITH_8BIT, build
from cases.rules import CODECS, DTYPES, assert_same, every_case, usual
from reference.group import Group, fresh_group, op_options, random_group
from reference.rules import RULES

SHAPES = [(5, 300), (64,), (3, 256), (2, 1), (1, 1000), (4, 3, 5, 7), (9, 5), (0, 3), (300, 2)]
NAN_BITS = 0x7FFFFFFF  # of every NaN that is written
MIXES = [(dtype, grad) for dtype in DTYPES for grad in dict.fromkeys([dtype, torch.float32])]


def on_cuda(op: str, *args: Any, **kwargs: Any) -> Any:
    return backends.simulated()[op](*args, **kwargs)


def check_step(group: Group, options: dict[str, Any] | None = None, /, **scaling: bool | Tensor) -> Group:
    """Steps the group on CUDA and a copy of it on the CPU, which it returns."""
    copy, arguments = group.clone(), op_options(options or usual(group.rule)) | scaling
    RULES[group.rule].operator(*copy.lists().values(), **arguments)
    on_cuda(f"{group.rule}_step_", *group.lists().values(), **arguments)
    assert_same(copy.with_grads([]), group.with_grads([]))
    return copy


def check_halves(group: Group, /, **scaling: bool | Tensor) -> None:
    """Steps the group by halves on CUDA, and copies of it by halves and at once on the CPU."""
    whole, halves = group.clone(), group.clone()
    whole.step(None, **scaling)
    expected = halves.half_steps(None, **scaling)
    with backends.use("cuda_on_cpu"):
        directions = group.half_steps(None, **scaling)
    for x, y in zip(directions, expected, strict=True):
        check_same_bits(x, y)
    assert_same(whole.with_grads([]), group.with_grads([]))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def check_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def merged(groups: list[Group]) -> Group:
    """All tensors in one group."""
    first, *others = groups
    for other in others:
        for name, tensors in other.lists().items():
            first.lists()[name].extend(tensors)
    return first


def mixed_group(rule: str, codec: dict[str, Any]) -> Group:
    """Every combination of dtypes, which share a launch."""
    steps = (0, 1, 6, 999, 10_000)
    return merged([random_group(rule, SHAPES, **codec, dtype=p, grad_dtype=g, steps=steps) for p, g in MIXES])


def spoiled(grad: Tensor) -> Tensor:
    """With elements that are not finite, and some whose square is not."""
    grad = grad.clone()
    for start, value in enumerate((math.nan, math.inf, -math.inf, torch.finfo(grad.dtype).max)):
        grad.view(-1)[3 * start :: 29] = value
    return grad


# ---- steps -----------------------------------------------------------------------------------------------------


@every_case
def test_dtypes_and_layouts_in_one_call(rule, codec):
    group = mixed_group(rule, codec)
    check_step(group)
    check_step(group.with_grads([spoiled(grad) for grad in group.grads]))


@every_case
def test_halves(rule, codec):
    """The CPU's step and directions, of elements that are left alone, too."""
    group = mixed_group(rule, codec)
    group = group.with_grads([spoiled(grad) if i % 2 else grad for i, grad in enumerate(group.grads)])
    check_halves(group, maximize=True, clip=torch.linspace(0, 1.7, len(group.params)))


@every_case
def test_a_half_that_is_skipped(rule, codec):
    """By a number in either memory, or by one that only the device could refuse."""
    for scaling in ({"found_inf": torch.tensor(1.0)}, {"found_inf": torch.ones(1)}, {"clip": torch.full((9,), -1.0)}):
        group = random_group(rule, SHAPES, **codec)
        before = group.clone()
        with backends.use("cuda_on_cpu"):
            directions = group.half_steps(None, **scaling)
        assert all(torch.equal(bits(x), torch.full_like(bits(x), NAN_BITS)) for x in directions)
        assert_same(before, group)


@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize("rule", [rule for rule in RULES if len(RULES[rule].states) > 1])
def test_states_of_several_codecs(rule, layout):
    coded, names = mixed_group(rule, {"bits": 8, "layout": layout}), list(RULES[rule].states)
    for plain in dict.fromkeys([tuple(names[:1]), tuple(names[1:]), tuple(names[-1:])]):
        group = coded.with_fp32(*plain)
        check_step(group.clone().with_grads([spoiled(grad) for grad in group.grads]))
        check_halves(group)


@every_case
def test_factors(rule, codec):
    group = mixed_group(rule, codec)
    factors = torch.linspace(0, 1.7, len(group.params))
    trust = {"trust": factors.flip(0)} if RULES[rule].trust else {}
    check_step(group, maximize=True, grad_scale=torch.tensor([3.0]), clip=factors, **trust)


@every_case
def test_widths_and_misaligned_memory(rule, codec, guard):
    widths = [*range(1, 12), 31, 33, 248, *range(255, 265), 511, 513, 520]
    check_step(random_group(rule, [(2, width) for width in widths], **codec).map(guard))
    low = random_group(rule, [(3, width) for width in (5, 8, 255, 256, 264, 300)], **codec, dtype=torch.bfloat16)
    check_step(low.map(guard))


@every_case
def test_many_tensors_in_one_call(rule, codec):
    """More than a batch of kernel arguments, and more than a warp looks at when it searches."""
    shapes = [(i % 3, 1 + i % 5) if i % 97 else (2, 700) for i in range(700 if rule == "adam" else 70)]
    check_step(random_group(rule, shapes, **codec, steps=range(11)))


@pytest.mark.parametrize("rule", RULES)
def test_no_tensors(rule):
    check_step(Group(rule))


@pytest.mark.parametrize("rule", ["adam", "lion"])
@pytest.mark.parametrize("codec", CODECS)
def test_a_tensor_for_all_thread_blocks(rule, codec):
    check_step(random_group(rule, [(300, 307), (3, 3), (100, 256)], **CODECS[codec]))


@every_case
def test_a_run_from_the_start(rule, codec):
    """Zero blocks, then codes of every size, with gradients that vanish in between."""
    group = fresh_group(rule, [(4, 300), (10, 77)], **codec)
    generator = torch.Generator().manual_seed(5)
    for scale in (1e-2, 0.0, 1e-20, 1e-38, 1e18, 1.0):
        group = group.with_grads([torch.randn(p.shape, generator=generator) * scale for p in group.params])
        check_step(group, usual(rule, lr=1e-2, eps=0.0))


@pytest.mark.parametrize("absmax", [math.inf, math.nan, 1e-44])
@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule].states])
def test_scales_that_are_no_numbers(rule, absmax):
    """As in a spoiled checkpoint."""
    group = random_group(rule, [(5, 300)], bits=8)
    for scales in group.absmax.values():
        scales[0][1:3] = absmax
    check_step(group)


@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule].states])
def test_codes_that_no_step_writes(rule):
    """As in a spoiled checkpoint: negative squares."""
    group = random_group(rule, [(5, 300)], bits=8)
    for codes in group.states.values():
        codes[0].copy_(torch.arange(1500).view(5, 300))
    check_step(group)


# ---- states outside a step -------------------------------------------------------------------------------------


def values_of(*shape: int) -> Tensor:
    """Over many decades, some of them not finite; a row of zeros."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 10 ** (-9 * torch.rand(shape, generator=generator))
    x = spoiled(x) if x.numel() > 300 else x
    x[1:2] = 0
    return x


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("role", facts.ROLES)
@pytest.mark.parametrize("codec", facts.CODECS)
def test_codes_of_states(codec, role, flat, guard):
    widths = [*range(12), 31, 33, *range(254, 265), 511, 513, 520]
    values = [guard(values_of(3, width)) for width in widths] + [torch.empty(0, 3), values_of(70, 301).t()]
    for x in values:
        codes, absmax = on_cuda("encode_state", x, codec, role, flat)
        expected, scales = torch.ops.bnbops.encode_state(x, codec, role, flat)
        check_same_bits(codes, expected)
        check_same_bits(absmax, scales)
        check_decoding(guard(codes), absmax, codec, role)


def check_decoding(codes: Tensor, absmax: Tensor, codec: str, role: str) -> None:
    expected = torch.ops.bnbops.decode_state(codes, absmax, codec, role)
    check_same_bits(on_cuda("decode_state", codes, absmax, codec, role), expected)


@pytest.mark.parametrize("role", facts.ROLES)
@pytest.mark.parametrize("codec", facts.CODECS)
def test_values_of_all_codes(codec, role):
    """Under any scale, that of a spoiled checkpoint too."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(5).view(facts.CODECS[codec].dtype)
    check_decoding(codes, torch.tensor([1.0, 1e-44, 3e38, math.inf, math.nan]), codec, role)


@pytest.mark.parametrize("role", facts.ROLES)
@pytest.mark.parametrize("codec", facts.CODECS)
def test_codes_around_every_step(codec, role):
    """Of the floats beside each midpoint of neighbouring values, where a table and arithmetic could differ."""
    values = torch.tensor(facts.CODECS[codec].values(facts.ROLES[role]), dtype=torch.float64).sort().values
    values = values[values.isfinite()]
    midpoints = bits(((values[1:] + values[:-1]) / 2).float())
    near = torch.cat([midpoints + i for i in range(-40, 41)]).view(torch.float32)
    near = torch.cat([near, torch.zeros(-len(near) % 255)]).view(-1, 255)
    x = torch.cat([torch.ones(len(near), 1), near], 1)  # whose scales are 1
    check_same_bits(on_cuda("encode_state", x, codec, role)[0], torch.ops.bnbops.encode_state(x, codec, role)[0])


# ---- numbers in the device's memory ----------------------------------------------------------------------------
#
# In the simulator, tensors without dimensions are the host's.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
@every_case
def test_learning_rate_of_either_memory_and_precision(rule, codec, shape, dtype):
    group = random_group(rule, [(3, 100)], **codec)
    check_step(group, lr=torch.full(shape, 0.0123, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (1,)])
@every_case
def test_found_inf_and_grad_scale_of_either_memory(rule, codec, shape):
    group = random_group(rule, [(3, 100), (7,)], **codec)
    scale = torch.full(shape, 4.0)
    before = group.clone()
    check_step(group, grad_scale=scale, found_inf=torch.full(shape, 1.0))
    assert_same(before, group)
    check_step(group, grad_scale=scale, found_inf=torch.zeros(shape))
    assert group.steps[0] == before.steps[0] + 1


UNUSABLE = {
    "lr": [torch.tensor([x]) for x in (math.nan, math.inf)],
    "grad_scale": [torch.tensor([x]) for x in (math.nan, math.inf, 0.0, -1.0)],
    "clip": [torch.tensor([0.5, x]) for x in (math.nan, math.inf, -1.0)],
    "steps": [torch.tensor(x) for x in (math.nan, math.inf, -1.0)],
}


@pytest.mark.parametrize(("name", "value"), [(name, x) for name, values in UNUSABLE.items() for x in values])
@pytest.mark.parametrize("rule", RULES)
def test_what_only_the_device_could_refuse_changes_nothing(rule, name, value):
    """The second parameter stays as it is, step count included; the first one too if the number is both's."""
    group = random_group(rule, [(3, 100), (70,)], bits=8 if RULES[rule].states else 32)
    if name == "steps":
        group.steps[1] = value
    before, arguments = group.clone(), op_options(usual(rule)) | ({} if name == "steps" else {name: value})
    on_cuda(f"{rule}_step_", *group.lists().values(), **arguments)
    for i, stays in enumerate((name in ("lr", "grad_scale"), True)):
        for old, new in zip(before.lists().values(), group.lists().values(), strict=True):
            if stays and new:
                assert torch.equal(old[i].nan_to_num(), new[i].nan_to_num())
        assert stays or group.steps[i] == before.steps[i] + 1


# ---- norms -----------------------------------------------------------------------------------------------------


def check_squared_norms(tensors: list[Tensor]) -> None:
    assert torch.equal(on_cuda("squared_norms", tensors), torch.ops.bnbops.squared_norms(tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_norms(dtype, guard):
    """Parts of a piece, pieces, and more of them than columns; on any boundary."""
    generator = torch.Generator().manual_seed(0)
    sizes = [*range(20), 255, 256, 257, 4095, 4096, 4097, 9000, 50_001]
    tensors = [guard(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
    check_squared_norms(tensors)
    check_squared_norms([spoiled(x) for x in tensors[1:]] + [torch.randn(30, 40).to(dtype).t()])


def test_squared_norms_of_many_pieces():
    check_squared_norms([torch.randn(270 * 4096 + 11, generator=torch.Generator().manual_seed(1))])


def test_squared_norms_of_many_tensors():
    check_squared_norms([torch.full((i % 5, 3), 0.1 * i) for i in range(700)])


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("percentile", [0, 5, 50, 99])
def test_percentile_clipping(percentile, shape):
    """Ties included; more parameters than a batch of arguments."""
    generator = torch.Generator().manual_seed(percentile)
    history = [torch.randint(0, 9, (100,), generator=generator) / 8 for _ in range(300)]
    history[7].fill_(math.inf)
    steps = [torch.tensor(float(i % 5) * 33) for i in range(300)]
    on_cpu = [x.clone() for x in history]
    for _ in range(3):
        squares = torch.rand(300, generator=generator, dtype=torch.float64) ** 9 * 100
        arguments = {"percentile": percentile, "grad_scale": torch.full(shape, 1.5)}
        expected = torch.ops.bnbops.percentile_clip_(on_cpu, squares, steps, **arguments)
        assert torch.equal(on_cuda("percentile_clip_", history, squares, steps, **arguments), expected)
        assert all(map(torch.equal, history, on_cpu))
        steps = [step + 1 for step in steps]


def test_an_overflow_that_the_host_knows_launches_nothing():
    """So an optimizer has an operator check its arguments before any writes; on the device, kernels have to look."""
    group = random_group("adam", SHAPES, bits=8)
    before, arguments = group.clone(), op_options(usual("adam"))
    for found_inf, launches in ((torch.tensor(1.0), False), (torch.ones(1), True), (torch.tensor(0.0), True)):
        with torch.autograd.profiler.profile() as profile:
            on_cuda("adam_step_", *group.lists().values(), **arguments, found_inf=found_inf)
        allocates = any("empty" in event.name for event in profile.function_events)  # for the records of a launch
        assert allocates == launches
        if found_inf.item():
            assert_same(before, group)


@pytest.mark.parametrize("changed", ["squares", "steps", "grad_scale", "found_inf"])
def test_percentile_clipping_of_unusable_numbers_is_none(changed):
    value = 1.0 if changed == "found_inf" else math.nan
    squares = torch.tensor([value if changed == "squares" else 1e9], dtype=torch.float64)
    steps = [torch.tensor(value if changed == "steps" else 3.0)]
    scaling = {changed: torch.tensor([value])} if changed in ("grad_scale", "found_inf") else {}
    history = [torch.rand(100)]
    before = history[0].clone()
    assert on_cuda("percentile_clip_", history, squares, steps, percentile=5, **scaling) == 1.0
    assert torch.equal(history[0], before)


# ---- optimizers ------------------------------------------------------------------------------------------------


class Transfers(TorchDispatchMode):
    """Notes what waits for a device: its numbers read, or tensors moved."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        outputs = {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
        if "_local_scalar_dense" in str(func) or (len(inputs) == 1 and outputs and inputs != outputs):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("name", WITH_8BIT)
def test_no_step_waits_for_the_device(name):
    """Parameters that claim to be on a GPU, through all that Python does in a step."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in ((64, 80), (64,))]
        optimizer = build(name, params, optim_bits=8, percentile_clipping=5)
        optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.init_state()
        with Transfers() as transfers:
            optimizer.step()
    assert transfers.found == []

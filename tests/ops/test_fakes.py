"""Fake kernels against real ones: the same shapes, dtypes, strides and refusals; fake devices; symbolic shapes.

Also what autograd sees of the operators.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

import bnbops.functional as F
from bnbops.testing.samples import SAMPLED, operator, samples

pytestmark = pytest.mark.every_torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITH_TENSORS = [name for name in SAMPLED if "Tensor" in str(operator(name)._schema)]
ONE_TENSOR = ("encode_state", "int8_double_quant", "int8_vectorwise_quant")
Outcome = tuple[str, Any]


def described(value: Any) -> Any:
    """What a fake has to get right about a result."""
    return tree_map_only(Tensor, lambda x: (tuple(x.shape), x.stride(), x.dtype, x.requires_grad), value)


def outcome(overload: Callable[..., Any], arguments: dict[str, Any]) -> Outcome:
    """A description of the result, or of the refusal."""
    try:
        return "result", described(overload(**arguments))
    except RuntimeError as error:
        return "refusal", str(error).splitlines()[0]


def fake_outcome(overload: Callable[..., Any], arguments: dict[str, Any]) -> Outcome:
    """The same on fake copies of the tensors."""
    with FakeTensorMode() as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, arguments)
        return outcome(overload, fakes)


def fresh_fake(x: Tensor, device: str = "cpu") -> Tensor:
    """Under a FakeTensorMode, a tensor of the same layout that is no view and requires no grad: ten times faster to
    make than by `from_tensor`."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


# ---- side by side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_good_input(name):
    for sample in samples(name):
        arguments = sample.arguments(operator(name))
        fake, real = fake_outcome(operator(name), arguments), outcome(operator(name), arguments)
        assert fake == real, sample.name
        assert real[0] == "result", sample.name


BAD_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "int32": lambda x: x.int(),
    "bool": lambda x: x.bool(),
    "uint8": lambda x: x.to(torch.uint8),
    "int16": lambda x: x.short(),
    "complex64": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "flat": lambda x: x.reshape(-1),
    "one more dimension": lambda x: x.clone().unsqueeze(-1),
    "one dimension less": lambda x: x[0].clone() if x.dim() and len(x) else x,
    "one more element": lambda x: torch.cat([x.reshape(-1), x.new_ones(1)]),
    "one more row": lambda x: torch.cat([x, x.new_ones(1, *x.shape[1:])]) if x.dim() else x.expand(2).clone(),
    "one more column": lambda x: torch.cat([x, x[..., :1]], dim=-1) if x.dim() else x.clone().expand(1, 1),
    "empty": lambda x: x.new_empty(0),
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2] if x.dim() else x,
    "transposed": lambda x: x.t().contiguous().t() if x.dim() == 2 else x,
    "expanded": lambda x: x.new_ones(()).expand(x.shape),
}
BAD_LISTS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "one tensor less": lambda xs: xs[:-1],
    "one tensor more": lambda xs: [*xs, torch.ones(7)],
    "no tensors": lambda xs: [],
    "reversed": lambda xs: xs[::-1],
}
BAD_SHAPES: dict[str, Callable[[list[int]], list[int]]] = {
    "one size less": lambda sizes: sizes[:-1],
    "one size more": lambda sizes: [*sizes, 1],
    "reversed": lambda sizes: sizes[::-1],
    "a larger size": lambda sizes: [*sizes[:-1], sizes[-1] + 2] if sizes else [7],
    "a negative size": lambda sizes: [-size for size in sizes],
}
BAD_VALUES: dict[str, Callable[[Any], Any]] = {
    "other type": lambda value: "int5" if type(value) is str else value,
    "blocksize 0": lambda value: 0 if type(value) is int else value,
    "negative blocksize": lambda value: -64 if type(value) is int else value,
    "twice the blocksize": lambda value: 2 * value if type(value) is int else value,
    "dtype float64": lambda value: torch.float64 if isinstance(value, torch.dtype) else value,
    "dtype int8": lambda value: torch.int8 if isinstance(value, torch.dtype) else value,
    "other dtype": lambda value: torch.bfloat16 if isinstance(value, torch.dtype) else value,
}


def bad(argument: str, value: Any) -> dict[str, Callable[[Any], Any]]:
    """The ways to spoil an argument."""
    if isinstance(value, Tensor):
        return BAD_TENSORS
    return BAD_SHAPES if argument == "shape" else BAD_LISTS if isinstance(value, list) else BAD_VALUES


def spoil(arguments: dict[str, Any], rng: random.Random) -> str:
    """Changes one argument, or one tensor of a list; says what was done."""
    argument = rng.choice(sorted(arguments))
    value = arguments[argument]
    if isinstance(value, list) and value and argument != "shape" and rng.random() < 0.7:
        i, (how, change) = rng.randrange(len(value)), rng.choice(list(BAD_TENSORS.items()))
        arguments[argument] = [change(x) if j == i else x for j, x in enumerate(value)]
        return f"{argument}[{i}] {how}"
    how, change = rng.choice(list(bad(argument, value).items()))
    arguments[argument] = change(value)
    return f"{argument} {how}"


# What only data can tell is no business of a fake, and a CUDA kernel does not wait for it either, but for addresses.
SHARED = "share memory"
IN_DATA = ("must be sorted", "must be positive and finite", "must be finite", "must be 0 or more")


def bad_calls(name: str) -> Iterator[tuple[list[str], dict[str, Any], Outcome]]:
    """Hundreds of calls with one to three things wrong: what is, the arguments, and what the operator says.

    Two wrong things at once show in which order kernels check.
    """
    rng = random.Random(0)
    good = [sample.map(Tensor.detach) for sample in samples(name)]
    for _ in range(400):
        arguments = rng.choice(good).clone().arguments(operator(name))
        wrong = [spoil(arguments, rng) for _ in range(rng.choice((1, 2, 3)))]
        yield wrong, arguments, outcome(operator(name), arguments)


def refused_for(real: Outcome, *words: str) -> bool:
    return real[0] == "refusal" and any(word in real[1] for word in words)


@pytest.mark.filterwarnings("ignore:Casting complex values to real")  # by the spoiling itself
@pytest.mark.parametrize("name", WITH_TENSORS)
def test_bad_input(name):
    """Refused by both with the same words, or by neither."""
    refusals = set()
    for wrong, arguments, real in bad_calls(name):
        with FakeTensorMode():
            fake = outcome(operator(name), tree_map_only(Tensor, fresh_fake, arguments))
        if refused_for(real, *IN_DATA, SHARED):
            assert fake[0] == "result", wrong
            continue
        if refused_for(real, "no tensor arguments"):  # the dispatcher has no kernel to ask
            assert fake[0] == "refusal", wrong
            continue
        assert fake == real, wrong
        if real[0] == "refusal":
            refusals.add(real[1])
    assert len(refusals) > (5 if name in ONE_TENSOR else 15)
    assert all(message.startswith(f"bnbops::{name.partition('.')[0]}: ") for message in refusals)


# ---- fake devices ----------------------------------------------------------------------------------------------


def fake_cuda(x: Tensor) -> Tensor:
    """The tensor as it would be on a GPU that is not there. Without grad: a torch without CUDA aborts in autograd."""
    return fresh_fake(x, "cuda")


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_fake_cuda_tensors(name):
    """Everything on the GPU but, as with torch's fused optimizers, an lr on the CPU; options always are."""
    for sample in samples(name):
        real = outcome(operator(name), sample.map(Tensor.detach).arguments(operator(name)))
        with FakeTensorMode() as mode:
            arguments = sample.map(fake_cuda).arguments(operator(name))
            for held in sample.kwargs.keys() & {"lr", "options"}:
                arguments[held] = mode.from_tensor(sample.kwargs[held])
            result = operator(name)(**arguments)
        assert ("result", described(result)) == real, sample.name
        devices = tree_map_only(Tensor, lambda x: x.device, result)
        assert devices == tree_map_only(Tensor, lambda x: torch.device("cuda", 0), result), sample.name


@pytest.mark.parametrize("name", [name for name in WITH_TENSORS if name not in ONE_TENSOR])
def test_mixed_devices_are_refused(name):
    """One tensor of each argument in turn on the CPU while the others are on the GPU."""
    first, *_ = samples(name)
    arguments = first.arguments(operator(name))
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor) or (isinstance(v, list) and v)}
    tensors.pop("shape", None)
    for argument, value in tensors.items():
        if argument == "lr" or len(tensors) == 1:
            continue
        with FakeTensorMode() as mode:
            mixed = first.map(fake_cuda).arguments(operator(name))
            if isinstance(value, list):
                mixed[argument][-1] = mode.from_tensor(value[-1])
            else:
                mixed[argument] = mode.from_tensor(value)
            with pytest.raises(RuntimeError, match=r"is on another device than the first tensor"):
                operator(name)(**mixed)


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_meta_tensors(name):
    """torch.device("meta") uses the same fakes."""
    for sample in samples(name):
        arguments = sample.map(lambda x: x.to("meta")).arguments(operator(name))
        arguments |= {k: v for k, v in sample.kwargs.items() if k == "options"}  # always on the CPU
        real = outcome(operator(name), sample.arguments(operator(name)))
        meta = outcome(operator(name), arguments)
        assert meta[0] == "result", meta
        if all(x.is_contiguous() for x in sample.args if isinstance(x, Tensor)):  # .to("meta") may change strides
            assert meta == real


# ---- symbolic shapes -------------------------------------------------------------------------------------------


def test_one_graph_for_all_sizes():
    """dynamic=True: quantize and dequantize for any number of elements without compiling again. (Except that the
    compiler treats sizes 0 and 1 apart: here, a single block.) blocksize is a constant of the graph."""
    counter = CompileCounterWithBackend("aot_eager")
    code = F.create_dynamic_map()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def there_and_back(x: Tensor) -> tuple[Tensor, ...]:
        codes, absmax = torch.ops.bnbops.quantize_blockwise(x, code, 64)
        values = torch.ops.bnbops.dequantize_blockwise(codes, absmax, code, 64, torch.bfloat16)
        return codes, absmax, values

    for shape in [(3, 100), (7, 333), (64, 64), (2, 33), (1000, 41)]:
        x = torch.randn(shape)
        codes, absmax = torch.ops.bnbops.quantize_blockwise(x, code, 64)
        values = torch.ops.bnbops.dequantize_blockwise(codes, absmax, code, 64, torch.bfloat16)
        compiled = there_and_back(x)
        assert all(torch.equal(a, b) for a, b in zip(compiled, (codes, absmax, values), strict=True))
    assert counter.frame_count == 1


def test_sizes_that_do_not_fit_are_refused_while_tracing():
    """The check compares a symbolic number of blocks with a symbolic length of absmax."""

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def dequantize(codes: Tensor, absmax: Tensor) -> Tensor:
        code = F.create_dynamic_map()
        return torch.ops.bnbops.dequantize_blockwise(codes, absmax, code, 64, torch.float32)

    codes = torch.zeros(300, dtype=torch.uint8)
    assert dequantize(codes, torch.ones(5)).shape == (300,)
    with pytest.raises(Exception, match="codes in blocks of 64 need"):
        dequantize(codes, torch.ones(4))


def test_export_keeps_a_dynamic_size():
    """And leaves nothing fake behind: the default codebook serves the eager call after it."""

    class RoundTrip(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            codes, state = F.quantize_blockwise(x, blocksize=64)
            return F.dequantize_blockwise(codes, state)

    program = torch.export.export(
        RoundTrip(), (torch.randn(10, 30),), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}}
    )
    x = torch.randn(77, 30)
    assert torch.equal(program.module()(x), RoundTrip()(x))


# ---- autograd --------------------------------------------------------------------------------------------------


def plain_dequantize(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """The formula, in torch operations that autograd knows."""
    block = torch.arange(codes.numel()) // blocksize
    return (code[codes.flatten().long()] * absmax.flatten()[block]).view(codes.shape).to(dtype)


def inputs(*, absmax_shape: tuple[int, ...] = (6,)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (11, 8), generator=generator).byte()
    absmax = torch.rand(absmax_shape, generator=generator) + 0.5
    return codes, absmax.requires_grad_(), F.create_dynamic_map().requires_grad_()


@pytest.mark.parametrize("absmax_shape", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_formula(dtype, absmax_shape):
    codes, absmax, code = inputs(absmax_shape=absmax_shape)
    weight = torch.randn(codes.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    values = torch.ops.bnbops.dequantize_blockwise(codes, absmax, code, 16, dtype)
    plain = plain_dequantize(codes, absmax, code, 16, dtype)
    assert torch.equal(values, plain)
    actual = torch.autograd.grad((values * weight).sum(), (absmax, code))
    expected = torch.autograd.grad((plain * weight).sum(), (absmax, code))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_gradcheck():
    """Against finite differences, twice. The formula is linear in either input: a coarse step is exact."""
    codes, absmax, code = inputs()

    def dequantize(absmax: Tensor, code: Tensor) -> Tensor:
        return torch.ops.bnbops.dequantize_blockwise(codes, absmax, code, 16, torch.float32)

    tolerances = {"eps": 0.0625, "atol": 1e-4, "rtol": 1e-4}
    assert torch.autograd.gradcheck(dequantize, (absmax, code), **tolerances)
    assert torch.autograd.gradgradcheck(dequantize, (absmax, code), **tolerances)


@pytest.mark.parametrize("which", ["absmax", "code"])
def test_gradient_of_one_input(which):
    codes, absmax, code = inputs()
    asked, other = (absmax, code) if which == "absmax" else (code, absmax)
    other.requires_grad_(False)
    torch.ops.bnbops.dequantize_blockwise(codes, absmax, code, 16, torch.float32).sum().backward()
    expected = torch.autograd.grad(plain_dequantize(codes, absmax, code, 16, torch.float32).sum(), asked)
    torch.testing.assert_close(asked.grad, *expected)
    assert other.grad is None


def test_compiled_gradients():
    codes, absmax, code = inputs()

    def loss(absmax: Tensor, code: Tensor) -> Tensor:
        return torch.ops.bnbops.dequantize_blockwise(codes, absmax, code, 16, torch.float32).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(absmax, code), (absmax, code))
    assert all(map(torch.equal, torch.autograd.grad(compiled(absmax, code), (absmax, code)), expected))


def test_quantizing_is_not_differentiable():
    """Its outputs require no grad, so that no gradient is lost without a word."""
    x = torch.randn(100, requires_grad=True)
    assert not any(y.requires_grad for y in torch.ops.bnbops.quantize_blockwise(x, F.create_dynamic_map(), 64))


def test_autograd_notices_a_written_out():
    """Backward through a graph that saved the old values of `out` is refused, as for torch's own operators."""
    codes, absmax, code = (x.detach() for x in inputs())
    out, x = torch.ones(codes.shape), torch.ones(codes.shape, requires_grad=True)
    product = (x * out).sum()
    torch.ops.bnbops.dequantize_blockwise.out(codes, absmax, code, 16, torch.float32, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_fakes_hold_no_data():
    """A fake kernel that computed something would fail here."""
    with FakeTensorMode():
        x = torch.empty(1 << 20, 1 << 20)  # 4 TiB
        codes, absmax = torch.ops.bnbops.quantize_blockwise(x, torch.empty(256), 4096)
        assert isinstance(codes, FakeTensor) and codes.shape == x.shape and absmax.shape == (1 << 28,)

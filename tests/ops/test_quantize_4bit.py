"""4-bit quantization against bitsandbytes' bytes and against plain torch (reference/quantize_4bit.py)."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import bnbops.functional as F
from cases import backends
from cases.quantize_4bit import DTYPES, check, data, dequantize, dtypes, quantize, same_bits, sizes, types
from reference import quantize_4bit as ref

pytestmark = backends.on_every_backend

MAX = torch.finfo(torch.float32).max
MIN_NORMAL = torch.finfo(torch.float32).tiny
INF, NAN = math.inf, math.nan


# ---- codes -----------------------------------------------------------------------------------------------------


@types
@dtypes
def test_every_length(quant_type, dtype, guard):
    """Sweeps every tail, parity and misalignment; inputs and results lie in guarded memory."""
    whole = data(301, seed=3, dtype=dtype)
    for n in range(301):
        x = guard(whole[300 - n : 300])
        packed, absmax = quantize(x, 64, quant_type, torch.uint8)
        check(x, 64, quant_type, packed, absmax)
        out = guard(torch.zeros(n, dtype=dtype))
        dequantize.out(guard(packed), guard(absmax), 64, quant_type, [n], dtype, out=out)
        assert same_bits(out, ref.dequantize(packed, absmax, 64, quant_type, [n], dtype))


@sizes
def test_every_blocksize(quant_type, blocksize):
    for n in (blocksize - 1, blocksize, blocksize + 1, 2 * blocksize + 17, 10_001):
        x = data(n, seed=n)
        packed, absmax = quantize(x, blocksize, quant_type, torch.uint8)
        check(x, blocksize, quant_type, packed, absmax)
        for dtype in DTYPES:
            values = dequantize(packed, absmax, blocksize, quant_type, [n], dtype)
            assert same_bits(values, ref.dequantize(packed, absmax, blocksize, quant_type, [n], dtype))


@types
@pytest.mark.parametrize("storage", ref.STORAGE_DTYPES, ids=str)
def test_storage_changes_no_bit(quant_type, storage, guard):
    x = data(16, 40)
    packed, absmax = quantize(x, 64, quant_type, storage)
    assert packed.dtype == storage and packed.shape == (320 // storage.itemsize, 1)
    check(x, 64, quant_type, packed, absmax)
    values = dequantize(guard(packed), absmax, 64, quant_type, [16, 40], torch.bfloat16)
    assert same_bits(values, ref.dequantize(packed, absmax, 64, quant_type, [16, 40], torch.bfloat16))


def test_odd_bytes_do_not_fill_wide_storage():
    assert quantize(data(4), 64, "nf4", torch.bfloat16)[0].shape == (1, 1)
    with pytest.raises(RuntimeError, match=r"5 elements, 3 bytes when packed, .* whole number of bfloat16"):
        quantize(data(5), 64, "nf4", torch.bfloat16)


@types
@pytest.mark.parametrize("absmax", [1.0, 0.75, 3e-30, 2.0**100])
def test_around_every_midpoint(quant_type, absmax):
    """A tie takes the smaller value. In a block with absmax 1 or a power of two all products are exact."""
    values = ref.TABLES[quant_type].sort().values
    midpoints = (values[1:] + values[:-1]) / 2
    ulp = torch.nextafter(midpoints.abs(), torch.tensor(INF)) - midpoints.abs()
    x = (midpoints[:, None] + ulp[:, None] * torch.arange(-20, 21)).flatten()
    x = torch.cat([x, torch.tensor([1.0])]) * absmax
    packed, scale = quantize(x, 4096, quant_type, torch.uint8)
    assert scale.item() == torch.tensor(absmax)
    check(x, 4096, quant_type, packed, scale)
    if absmax == 1.0:
        chosen = ref.TABLES[quant_type][ref.unpack(packed, x.numel(), quant_type).long()][:-1].view(len(midpoints), -1)
        assert torch.equal(chosen[:, 20], values[:-1]) and torch.equal(chosen[:, 21], values[1:])


@types
@pytest.mark.parametrize("scale", [1.0, 0.3, 7e-30, 5e29])
def test_every_code_survives_a_round_trip(quant_type, scale):
    codes = torch.arange(16, dtype=torch.uint8)
    packed = ref.pack(codes, quant_type)
    values = dequantize(packed, torch.tensor([scale]), 64, quant_type, [16], torch.float32)
    again, absmax = quantize(values, 64, quant_type, torch.uint8)
    assert torch.equal(absmax, torch.tensor([scale]))
    first_zero = {"fp4": 0, "int4": 7}.get(quant_type, 8)
    assert torch.equal(ref.unpack(again, 16, quant_type), torch.where(codes == 8, first_zero, codes))


SPECIAL = {
    # name: (elements of a block, its absmax, the values that it decodes to)
    "zeros": ([0.0, -0.0, 0.0], 0.0, [0.0, 0.0, 0.0]),
    "nan counts as zero": ([NAN, 1.0, -NAN], 1.0, [0.0, 1.0, 0.0]),
    "only nan": ([NAN, NAN], 0.0, [0.0, 0.0]),
    "infinity saturates": ([INF, 1.0, NAN], MAX, [MAX, 0.0, 0.0]),
    "minus infinity too": ([-INF, INF, -1.0], MAX, [-MAX, MAX, 0.0]),
    "the largest float": ([MAX, -MAX, MAX * 2**-30], MAX, [MAX, -MAX, 0.0]),
    "the smallest normal float": ([MIN_NORMAL, 0.0, -MIN_NORMAL], MIN_NORMAL, [MIN_NORMAL, 0.0, -MIN_NORMAL]),
    "zeros of either sign beside others": ([-0.0, 0.0, 2.0], 2.0, [0.0, 0.0, 2.0]),
    "denormals beside others": ([1e-40, -1e-40, 2.0], 2.0, [0.0, 0.0, 2.0]),
}


@types
@pytest.mark.parametrize("case", SPECIAL)
def test_special_values(case, quant_type):
    """Also in the middle of other blocks: a special block changes no other."""
    elements, expected_absmax, values = SPECIAL[case]
    block, rest = torch.tensor(elements), data(64)
    x = torch.cat([rest, block, torch.zeros(64 - block.numel()), rest])
    packed, absmax = quantize(x, 64, quant_type, torch.uint8)
    check(x, 64, quant_type, packed, absmax)
    assert absmax[1] == torch.tensor(expected_absmax)
    assert torch.equal(packed[:32], packed[64:])
    decoded = dequantize(packed, absmax, 64, quant_type, [192], torch.float32)
    assert torch.equal(decoded[64 : 64 + len(values)], torch.tensor(values))


@types
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_special_values_of_short_dtypes(quant_type, dtype):
    x = torch.tensor([NAN, INF, -INF, 1.0, -0.0, torch.finfo(dtype).smallest_normal / 2], dtype=dtype)
    for part in (x, x[3:], x[4:], x[5:]):
        packed, absmax = quantize(part, 64, quant_type, torch.uint8)
        check(part, 64, quant_type, packed, absmax)


def test_codes_of_zero():
    """NF4: 7. FP4, with its two zeros: 8 for tiny positive elements, else 0. The padding is a zero."""
    x = torch.tensor([1.0, 0.0, -0.0, 1e-6, -1e-6, 1e-40, -1e-40, 2.0**-149, NAN])
    nf4, _ = quantize(x, 64, "nf4", torch.uint8)
    assert ref.unpack(nf4, 10, "nf4").tolist() == [15] + [7] * 9
    fp4, _ = quantize(x, 64, "fp4", torch.uint8)
    assert ref.unpack(fp4, 10, "fp4").tolist() == [3, 0, 0, 8, 0, 8, 0, 8, 0, 0]
    values = dequantize(fp4, torch.tensor([1.0]), 64, "fp4", [9], torch.float32)
    assert same_bits(values[1:], torch.zeros(8))  # no -0.0


@types
@pytest.mark.parametrize("absmax", [2**-149, 1e-44, 1e-41, 2**-128, 2**-127])
def test_denormal_blocks(absmax, quant_type):
    """A block this small may have no finite 1 / absmax. It decodes to something no farther off than its absmax."""
    x = torch.tensor([absmax, 0.0, absmax / 2, -absmax])
    packed, scale = quantize(x, 64, quant_type, torch.uint8)
    check(x, 64, quant_type, packed, scale)
    values = dequantize(packed, scale, 64, quant_type, [4], torch.float32)
    assert torch.equal(scale, x[:1])
    assert ((values - x).abs() <= absmax).all() and values[1] == 0


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t(),
    "strided": lambda x: x[:, ::3],
    "offset": lambda x: x[1::2, 5:],
    "expanded": lambda x: x[:, :1].expand(-1, 7),
    "permuted": lambda x: x.view(6, 5, 2, 20).permute(3, 1, 0, 2),
    "channels last": lambda x: x.view(6, 5, 8, 5).to(memory_format=torch.channels_last),
}


@dtypes
@pytest.mark.parametrize("view", VIEWS)
def test_strided_input_is_read_in_logical_order(view, dtype):
    x = VIEWS[view](data(30, 40, dtype=dtype))
    assert not x.is_contiguous()
    packed, absmax = quantize(x, 64, "nf4", torch.uint8)
    check(x, 64, "nf4", packed, absmax)


# ---- values ----------------------------------------------------------------------------------------------------


def nested_arguments(blocks: int, blocksize: int = 256, seed: int = 0) -> tuple[Tensor, dict[str, object]]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (blocks,), generator=generator).byte()
    nested_absmax = torch.rand(-(blocks // -blocksize), generator=generator)
    offset, code = torch.tensor(0.73), F.create_dynamic_map()
    names = ("nested_absmax", "nested_code", "nested_offset", "nested_blocksize")
    return codes, dict(zip(names, (nested_absmax, code, offset, blocksize), strict=True))


@types
@pytest.mark.parametrize("nested_blocksize", [1, 7, 256, 1 << 40])
def test_nested_scales(quant_type, nested_blocksize, guard):
    """Product and sum are rounded one after the other: the bits of dequantizing the scales first."""
    n = 300 * 64 + 9
    codes, nested = nested_arguments(301, nested_blocksize)
    packed = guard(torch.randint(256, ((n + 1) // 2,), generator=torch.Generator().manual_seed(1)).byte())
    nested = {k: guard(v) if isinstance(v, Tensor) else v for k, v in nested.items()}
    scales = ref.scales(codes, **nested | {"nested_blocksize": min(nested_blocksize, 301)})
    for dtype in DTYPES:
        values = dequantize(packed, codes, 64, quant_type, [n], dtype, **nested)
        assert same_bits(values, dequantize(packed, scales, 64, quant_type, [n], dtype))
        assert same_bits(values, ref.dequantize(packed, scales, 64, quant_type, [n], dtype))


def test_shapes_of_codes_and_scales_do_not_matter():
    packed, absmax = quantize(data(12, 64), 64, "nf4", torch.uint8)
    expected = dequantize(packed, absmax, 64, "nf4", [12, 64], torch.float32)
    for codes in (packed.t(), packed.view(12, 32), packed.view(-1)):
        assert torch.equal(dequantize(codes, absmax.view(3, 4), 64, "nf4", [12, 64], torch.float32), expected)
    assert torch.equal(dequantize(packed, absmax, 64, "nf4", [3, 4, 64], torch.float32).flatten(), expected.flatten())


def test_values_that_are_not_finite():
    """A scale that no quantization makes, but a file may hold: each value is the product, whatever it is."""
    packed = ref.pack(torch.tensor([15, 7, 0, 3], dtype=torch.uint8), "nf4")
    values = dequantize(packed, torch.tensor([INF]), 64, "nf4", [4], torch.float32)
    torch.testing.assert_close(values, torch.tensor([INF, NAN, -INF, -INF]), equal_nan=True)
    assert dequantize(packed, torch.tensor([NAN]), 64, "nf4", [4], torch.float32).isnan().all()
    assert dequantize(packed, torch.tensor([1e38]), 64, "nf4", [4], torch.float16).tolist()[0] == INF


@dtypes
def test_out_of_any_strides(dtype):
    packed, absmax = quantize(data(30, 40), 64, "fp4", torch.uint8)
    expected = dequantize(packed, absmax, 64, "fp4", [30, 40], dtype)
    memory = torch.full((40, 61), -1.0, dtype=dtype)
    out = memory[:, :60:2].t()
    dequantize.out(packed, absmax, 64, "fp4", [30, 40], dtype, out=out)
    assert torch.equal(out, expected)
    assert (memory[:, 1::2] == -1).all() and (memory[:, 60] == -1).all()


@dtypes
@pytest.mark.parametrize(("begin", "blocksize"), [(64, 64), (64, 32), (65, 64), (72, 256)])
def test_large_out_in_used_memory(dtype, begin, blocksize):
    """Written past the caches, if it begins with a cache line as `memory` does; its last block is short."""
    n = (8 << 20) // dtype.itemsize + 77
    generator = torch.Generator().manual_seed(n)
    packed = torch.randint(256, (-(-n // 2),), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(-(-n // blocksize), generator=generator)
    memory = torch.full((n + 200,), -1.0, dtype=dtype)
    assert memory.data_ptr() % 64 == 0
    out = memory[begin : begin + n]
    dequantize.out(packed, absmax, blocksize, "nf4", [n], dtype, out=out)
    assert same_bits(out, ref.dequantize(packed, absmax, blocksize, "nf4", [n], dtype))
    assert (memory[:begin] == -1).all() and (memory[begin + n :] == -1).all()


@backends.on_cpu
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads):
    x = data((1 << 20) - 5)
    codes, nested = nested_arguments(1 << 14)

    def there_and_back() -> list[Tensor]:
        packed, absmax = quantize(x, 64, "nf4", torch.uint8)
        values = dequantize(packed, absmax, 64, "nf4", [x.numel()], torch.bfloat16)
        return [packed, absmax, values, dequantize(packed, codes, 64, "nf4", [x.numel()], torch.float32, **nested)]

    one = there_and_back()
    torch.set_num_threads(threads)
    assert all(map(same_bits, one, there_and_back()))


# ---- autograd, fakes, compiler ---------------------------------------------------------------------------------


def test_nothing_is_differentiable():
    """Results require no grad, so that no gradient is lost without a word."""
    x = torch.randn(100, requires_grad=True)
    packed, absmax = quantize(x, 64, "nf4", torch.uint8)
    assert not packed.requires_grad and not absmax.requires_grad
    absmax.requires_grad_()
    assert not dequantize(packed, absmax, 64, "nf4", [100], torch.float32).requires_grad


def test_autograd_notices_a_written_out():
    packed, absmax = quantize(data(64), 64, "nf4", torch.uint8)
    out, x = torch.ones(64), torch.ones(64, requires_grad=True)
    product = (x * out).sum()
    dequantize.out(packed, absmax, 64, "nf4", [64], torch.float32, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_vmap_is_refused():
    x = data(3, 64)
    packed, absmax = quantize(x, 64, "nf4", torch.uint8)
    with pytest.raises(RuntimeError, match="quantize_4bit: vmap is not supported; call it"):
        torch.vmap(lambda row: quantize(row, 64, "nf4", torch.uint8))(x)
    with pytest.raises(RuntimeError, match="dequantize_4bit: vmap is not supported; call it"):
        torch.vmap(lambda p, s: dequantize(p, s, 64, "nf4", [64], torch.float32))(packed.view(3, 32), absmax)


def test_fakes_hold_no_data():
    """A fake kernel that computed something would fail here."""
    with FakeTensorMode():
        packed, absmax = quantize(torch.empty(1 << 20, 1 << 20), 4096, "nf4", torch.float32)  # 4 TiB
        assert packed.shape == (1 << 37, 1) and absmax.shape == (1 << 28,)
        values = dequantize(packed, absmax, 4096, "nf4", [1 << 20, 1 << 20], torch.bfloat16)
        assert values.shape == (1 << 20, 1 << 20) and values.dtype == torch.bfloat16


def test_one_graph_for_all_sizes():
    counter = CompileCounterWithBackend("aot_eager")

    def scaled_codes(x: Tensor) -> tuple[Tensor, ...]:
        packed, absmax = quantize(x, 64, "nf4", torch.uint8)
        return packed, absmax * 2

    torch._dynamo.reset()
    compiled = torch.compile(scaled_codes, backend=counter, fullgraph=True, dynamic=True)
    for shape in [(3, 100), (7, 333), (64, 64), (2, 33)]:
        x = data(*shape)
        assert all(map(same_bits, compiled(x), scaled_codes(x)))
    assert counter.frame_count == 1


@types
def test_functional_compiles_and_exports(quant_type):
    class RoundTrip(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            packed, state = F.quantize_4bit(x, compress_statistics=True, quant_type=quant_type)
            return F.dequantize_4bit(packed, state)

    x, module = data(10, 30), RoundTrip()
    expected = module(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), expected)
    assert torch.equal(module(x), expected)  # nothing fake is left behind


# ---- direct calls with nonsense --------------------------------------------------------------------------------


def good() -> dict[str, object]:
    """Arguments of dequantize_4bit.out, doubly quantized."""
    codes, nested = nested_arguments(10)
    packed = torch.arange(320).byte()
    first = {"A": packed, "absmax": codes, "blocksize": 64, "quant_type": "nf4", "shape": [10, 64]}
    return first | {"dtype": torch.float32} | nested | {"out": torch.zeros(10, 64)}


BAD: dict[str, tuple[dict[str, object], str]] = {
    "codes too short": ({"A": torch.zeros(319, dtype=torch.uint8)}, "A has 319 bytes, but shape .10, 64. needs 320"),
    "codes too long": ({"A": torch.zeros(81)}, "A has 324 bytes"),
    "codes of a wrong dtype": (
        {"A": torch.zeros(80, dtype=torch.int32)},
        "A must be uint8, int8, float32, .* got int32",
    ),
    "strided codes": ({"A": torch.zeros(640, dtype=torch.uint8)[::2]}, "A must be contiguous"),
    "scales too short": ({"absmax": torch.zeros(9, dtype=torch.uint8)}, "absmax has 9 elements, .* needs 10"),
    "float scales of nested ones": ({"absmax": torch.zeros(10)}, "absmax must be uint8, got float32"),
    "byte scales not nested": (
        {"nested_absmax": None, "nested_code": None, "nested_offset": None},
        "absmax must be float32, or int32 .* got uint8",
    ),
    "nested_code missing": ({"nested_code": None}, "go together"),
    "nested_absmax missing": ({"nested_absmax": None}, "go together"),
    "nested_offset alone": ({"nested_code": None, "nested_absmax": None}, "go together"),
    "nested_code of 16": ({"nested_code": torch.zeros(16)}, r"nested_code must have shape \[256\], got \[16\]"),
    "nested_absmax too long": ({"nested_absmax": torch.zeros(2)}, "nested_absmax has 2 elements, but 10 scales"),
    "nested_offset of two": ({"nested_offset": torch.zeros(2)}, "nested_offset must have one element"),
    "nested_offset of float64": (
        {"nested_offset": torch.zeros((), dtype=torch.float64)},
        "nested_offset must be float32",
    ),
    "nested_blocksize 0": ({"nested_blocksize": 0}, "nested_blocksize must be positive, got 0"),
    "blocksize 48": ({"blocksize": 48}, "power of two from 32 to 4096, got 48"),
    "blocksize 16": ({"blocksize": 16}, "power of two from 32 to 4096, got 16"),
    "blocksize 8192": ({"blocksize": 8192}, "power of two from 32 to 4096, got 8192"),
    "type": ({"quant_type": "NF4"}, "quant_type must be 'nf4' or 'fp4' or 'int4', got 'NF4'"),
    "negative size": ({"shape": [-10, -64]}, "must not have negative sizes"),
    "a size that overflows": ({"shape": [1 << 62, 1 << 62]}, "shape"),
    "dtype": ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16, got float64"),
    "out of another dtype": ({"out": torch.zeros(10, 64).half()}, "out must be float32, got float16"),
    "out of another shape": ({"out": torch.zeros(64, 10)}, r"out has shape \[64, 10\], but shape is \[10, 64\]"),
    "expanded out": ({"out": torch.zeros(1, 64).expand(10, 64)}, "out is expanded"),
}


@pytest.mark.parametrize("case", BAD)
def test_nonsense_is_refused_and_changes_nothing(case):
    changed, match = BAD[case]
    arguments = good() | changed
    with pytest.raises(RuntimeError, match=match):
        dequantize.out(**arguments)
    assert (arguments["out"] == 0).all()
    dequantize.out(**good())  # what was changed was all that was wrong


def test_out_that_shares_memory_is_refused():
    memory = torch.zeros(640)
    arguments = good() | {"out": memory.view(10, 64), "A": memory.view(torch.uint8)[:320]}
    with pytest.raises(RuntimeError, match="A and out share memory"):
        dequantize.out(**arguments)
    assert (memory == 0).all()

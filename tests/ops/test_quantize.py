"""Block-wise quantization against bitsandbytes' bytes and against brute force (reference/quantize.py)."""

import math

import pytest
import torch

import bnbops.functional as F
from bnbops.functional import QuantState, create_dynamic_map, create_fp8_map, create_linear_map
from cases import backends
from reference import quantize as ref

pytestmark = backends.on_every_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIN_NORMAL = torch.finfo(torch.float32).tiny
MAX = torch.finfo(torch.float32).max

# The encoder multiplies by a rounded 1 / absmax and places decade boundaries on multiples of 16 ulp:
# it may pick either neighbour up to 8 + 2 ulp beside a midpoint.
SLACK = 10 * 2**-23


def random_code(seed: int) -> torch.Tensor:
    values = torch.rand(254, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.cat([values, torch.tensor([0.0, 1.0])]).sort().values


CODES = {
    "dynamic": create_dynamic_map(True),
    "dynamic-unsigned": create_dynamic_map(False),
    "linear": create_linear_map(True),
    "linear-unsigned": create_linear_map(False),
    "fp8": create_fp8_map(),
    "dynamic-4bit": create_dynamic_map(True, 3, 4),
    "dynamic-3-decades": create_dynamic_map(True, 3),
    "random": random_code(1),
    "random-2": random_code(2),
}


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values over many decades, so that every part of a map is used."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** (-4 * torch.rand(shape, generator=generator))
    return x.to(dtype)


def check(x: torch.Tensor, code: torch.Tensor, blocksize: int, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    """`codes`, `absmax` are what brute force says they should be."""
    _, expected_absmax = ref.quantize(x, code, blocksize)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and codes.is_contiguous()
    assert torch.equal(absmax, expected_absmax)
    normalised = ref.normalised(x, blocksize)
    ref.assert_nearest(normalised, codes, code, slack=SLACK * normalised.abs())


@pytest.mark.every_torch
@pytest.mark.every_torch
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_golden(blocksize, golden):
    """Codes equal bitsandbytes' but for its 1/65535 grid (golden/README.md); absmax and values are its bits."""
    g = golden("blockwise8_64x97.safetensors")
    codes, state = F.quantize_blockwise(g["in.A"], blocksize=blocksize)
    expected = g[f"q_bs{blocksize}"]
    assert torch.equal(state.absmax, g[f"absmax_bs{blocksize}"])

    differ = codes != expected
    assert differ.float().mean() < 0.0025  # 13 of 6208, at most
    assert ((codes.int() - expected.int()).abs() <= 1).all()
    code, lower = g["map.dynamic_signed"].double(), torch.minimum(codes, expected)[differ].long()
    beside_midpoint = ref.normalised(g["in.A"], blocksize)[differ] - (code[lower] + code[lower + 1]) / 2
    assert (beside_midpoint.abs() <= ref.GRID).all()

    check(g["in.A"], g["map.dynamic_signed"], blocksize, codes, state.absmax)
    values = F.dequantize_blockwise(expected, absmax=g[f"absmax_bs{blocksize}"], blocksize=blocksize)
    assert torch.equal(values, g[f"deq_bs{blocksize}"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODES)
def test_matches_brute_force(name, dtype, guard):
    code = guard(CODES[name])
    for blocksize in (64, 256):
        for n in (0, 1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1000):
            x = guard(data(n, seed=n, dtype=dtype))
            codes, absmax = torch.ops.bnbops.quantize_blockwise(x, code, blocksize)
            check(x, code, blocksize, codes, absmax)
            values = torch.ops.bnbops.dequantize_blockwise(guard(codes), guard(absmax), code, blocksize, dtype)
            assert torch.equal(values, ref.dequantize(codes, absmax, code, blocksize, dtype))


@pytest.mark.parametrize("name", ["dynamic", "dynamic-unsigned", "random"])
def test_every_length_up_to_two_blocks(name, guard):
    """Sweeps every tail and every misalignment; results go into guarded memory."""
    code, x = CODES[name], data(2 * 256 + 1, seed=3)
    for n in range(2 * 256 + 1):
        part = x[513 - n :]
        codes, absmax = torch.ops.bnbops.quantize_blockwise(part, code, 256)
        check(part, code, 256, codes, absmax)
        out = guard(torch.zeros(n))
        torch.ops.bnbops.dequantize_blockwise.out(codes, absmax, code, 256, torch.float32, out=out)
        assert torch.equal(out, ref.dequantize(codes, absmax, code, 256, torch.float32))


@pytest.mark.parametrize("blocksize", [1, 2, 7, 64, 100, 128, 512, 1000, 2048, 4096, 1 << 40, 2**63 - 1])
@pytest.mark.parametrize("name", ["dynamic", "linear"])
def test_any_blocksize(name, blocksize):
    x = data(5, 301)
    codes, absmax = torch.ops.bnbops.quantize_blockwise(x, CODES[name], blocksize)
    check(x, CODES[name], blocksize, codes, absmax)
    values = torch.ops.bnbops.dequantize_blockwise(codes, absmax, CODES[name], blocksize, torch.float32)
    assert torch.equal(values, ref.dequantize(codes, absmax, CODES[name], min(blocksize, x.numel()), torch.float32))


@pytest.mark.parametrize("name", CODES)
def test_around_every_midpoint(name):
    """Monotonic, and exact but for the slack, at every midpoint and a few ulp beside it."""
    code = CODES[name]
    midpoints = (code[1:].double() + code[:-1].double()).div(2).float()
    ulp = torch.nextafter(midpoints.abs(), torch.tensor(math.inf)) - midpoints.abs()
    x = (midpoints[:, None] + ulp[:, None] * torch.arange(-40, 41)).flatten().sort().values
    x = torch.cat([x[x.abs() <= 1], torch.tensor([1.0])])  # one block with absmax 1
    codes, absmax = torch.ops.bnbops.quantize_blockwise(x, code, 1 << 20)
    assert absmax.item() == 1.0
    ref.assert_nearest(x, codes, code, slack=SLACK * x.abs())
    assert (code[codes.long()].diff() >= 0).all()


@pytest.mark.parametrize("scale", [1.0, 0.3, 7e-30, 5e29])
@pytest.mark.parametrize("name", CODES)
def test_every_code_survives_a_round_trip(name, scale):
    """quantize(dequantize(q)) == q; where entries are equal (fp8 has two zeros), their value survives."""
    code = CODES[name]
    q = torch.arange(256, dtype=torch.uint8)
    values = torch.ops.bnbops.dequantize_blockwise(q, torch.tensor([scale]), code, 256, torch.float32)
    again, absmax = torch.ops.bnbops.quantize_blockwise(values, code, 256)
    assert torch.equal(absmax, torch.tensor([scale]))
    unique = torch.tensor([(code == entry).sum() == 1 for entry in code])
    assert torch.equal(again[unique], q[unique])
    assert torch.equal(code[again.long()], code)


INF, NAN = math.inf, math.nan
SPECIAL = {
    # name: (elements of a block, its absmax, the values it decodes to with the signed dynamic map)
    "zeros": ([0.0, -0.0, 0.0], 0.0, [0.0, 0.0, 0.0]),
    "nan counts as zero": ([NAN, 1.0, -NAN], 1.0, [0.0, 1.0, 0.0]),
    "only nan": ([NAN, NAN], 0.0, [0.0, 0.0]),
    "infinity saturates": ([INF, 1.0, NAN], MAX, [MAX, 0.0, 0.0]),
    "minus infinity too": ([-INF, INF, 1.0], MAX, [-MAX * 0.99296874, MAX, 0.0]),
    "the largest float": ([MAX, -MAX * 2**-30, 0.0], MAX, [MAX, 0.0, 0.0]),
    "the smallest normal float": ([MIN_NORMAL, 0.0, NAN], MIN_NORMAL, [MIN_NORMAL, 0.0, 0.0]),
    "minus zero beside others": ([-0.0, 2.0], 2.0, [0.0, 2.0]),
    "denormal beside others": ([1e-40, 2.0], 2.0, [0.0, 2.0]),
}


@pytest.mark.parametrize("name", ["dynamic", "linear", "random"])
@pytest.mark.parametrize("case", SPECIAL)
def test_special_values(case, name):
    """Also in the middle of other blocks: a special block changes no other."""
    elements, expected_absmax, values = SPECIAL[case]
    code, block = CODES[name], torch.tensor(elements)
    rest = data(64)
    x = torch.cat([rest, block, torch.zeros(64 - block.numel()), rest])
    codes, absmax = torch.ops.bnbops.quantize_blockwise(x, code, 64)
    check(x, code, 64, codes, absmax)
    assert absmax[1].item() == pytest.approx(expected_absmax, rel=0)
    assert torch.equal(codes[:64], codes[128:])
    decoded = torch.ops.bnbops.dequantize_blockwise(codes, absmax, code, 64, torch.float32)
    assert decoded.isfinite().all()
    if name == "dynamic":
        torch.testing.assert_close(decoded[64 : 64 + len(values)], torch.tensor(values), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["dynamic", "dynamic-unsigned", "linear"])
@pytest.mark.parametrize("absmax", [2**-149, 1e-44, 1e-41, 2**-128, 2**-127])
def test_denormal_blocks(absmax, name):
    """A block this small may have no finite 1 / absmax. It decodes to something no farther off than its absmax."""
    x = torch.tensor([absmax, 0.0, absmax / 2, -absmax if CODES[name].min() < 0 else 0.0])
    codes, scale = torch.ops.bnbops.quantize_blockwise(x, CODES[name], 64)
    values = torch.ops.bnbops.dequantize_blockwise(codes, scale, CODES[name], 64, torch.float32)
    assert torch.equal(scale, x[:1])
    assert ((values - x).abs() <= absmax).all() and values[1] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, ::3],
        lambda x: x[1::2, 5:],
        lambda x: x[:, :1].expand(-1, 7),
        lambda x: x.view(6, 5, 2, 20).permute(3, 1, 0, 2),
        lambda x: x.view(6, 5, 8, 5).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "strided", "offset", "expanded", "permuted", "channels_last"],
)
def test_strided_input_is_read_in_logical_order(view, dtype):
    x = view(data(30, 40, dtype=dtype))
    assert not x.is_contiguous()
    strided = torch.ops.bnbops.quantize_blockwise(x, CODES["dynamic"], 64)
    contiguous = torch.ops.bnbops.quantize_blockwise(x.contiguous(), CODES["dynamic"], 64)
    check(x, CODES["dynamic"], 64, *strided)
    assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_codes_dequantize_in_logical_order(dtype):
    codes, absmax = ref.quantize(data(40, 30), CODES["dynamic"], 64)
    values = torch.ops.bnbops.dequantize_blockwise(codes.t(), absmax, CODES["dynamic"], 64, dtype)
    assert torch.equal(values, ref.dequantize(codes.t().contiguous(), absmax, CODES["dynamic"], 64, dtype))


@backends.on_cpu
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads):
    x = data((1 << 20) - 5)

    def there_and_back() -> tuple[torch.Tensor, ...]:
        codes, absmax = torch.ops.bnbops.quantize_blockwise(x, CODES["dynamic"], 64)
        return codes, absmax, torch.ops.bnbops.dequantize_blockwise(codes, absmax, CODES["dynamic"], 64, torch.bfloat16)

    one = there_and_back()
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, there_and_back(), strict=True))


# ---- bnbops.functional -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functional_defaults(dtype):
    """The signed dynamic map, blocks of 4096, and back to the input's dtype."""
    x = data(3, 5000, dtype=dtype)
    codes, state = F.quantize_blockwise(x)
    check(x, CODES["dynamic"], 4096, codes, state.absmax)
    assert isinstance(state, QuantState)
    assert state.blocksize == 4096 and state.dtype == dtype and torch.equal(state.code, CODES["dynamic"])
    assert not state.nested and state.offset is None and state.state2 is None
    values = F.dequantize_blockwise(codes, state)
    assert values.dtype == dtype
    assert torch.equal(values, ref.dequantize(codes, state.absmax, CODES["dynamic"], 4096, dtype))


def test_functional_arguments_by_position_and_name():
    """bitsandbytes' order: A, code, absmax, out, blocksize, nested; A, quant_state, absmax, code, out, blocksize."""
    x, code = data(10, 100), CODES["linear"]
    absmax, out = torch.zeros(16), torch.zeros(10, 100, dtype=torch.uint8)
    codes, state = F.quantize_blockwise(x, code, absmax, out, 64, False)
    check(x, code, 64, codes, state.absmax)
    assert codes.data_ptr() == out.data_ptr()
    values = torch.zeros(10, 100)
    returned = F.dequantize_blockwise(codes, None, state.absmax, code, values, 64, False)
    assert returned.data_ptr() == values.data_ptr()
    assert torch.equal(values, ref.dequantize(codes, state.absmax, code, 64, torch.float32))
    # without a state: the dynamic map, values as fp32
    plain = F.dequantize_blockwise(codes, absmax=state.absmax, blocksize=64)
    assert torch.equal(plain, ref.dequantize(codes, state.absmax, CODES["dynamic"], 64, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_takes_the_values(dtype, guard):
    codes, state = F.quantize_blockwise(data(7, 111, dtype=dtype), blocksize=64)
    out = guard(torch.zeros(7, 111, dtype=dtype))
    assert F.dequantize_blockwise(codes, state, out=out) is out
    assert torch.equal(out, F.dequantize_blockwise(codes, state))


def test_dequantize_needs_a_scale():
    with pytest.raises((ValueError, TypeError), match="absmax"):
        F.dequantize_blockwise(torch.zeros(4, dtype=torch.uint8))


def test_nested_quantizes_absmax_too():
    """nested=True: absmax minus its mean is quantized the same way; decoding goes back through both."""
    x = data(64, 97)
    codes, state = F.quantize_blockwise(x, blocksize=64, nested=True)
    plain_codes, plain = F.quantize_blockwise(x, blocksize=64)
    assert torch.equal(codes, plain_codes)
    assert state.nested and state.absmax.dtype == torch.uint8 and state.absmax.shape == plain.absmax.shape
    torch.testing.assert_close(state.offset, plain.absmax.mean(), rtol=1e-6, atol=0)
    assert isinstance(state.state2, QuantState) and not state.state2.nested
    check(plain.absmax - state.offset, state.state2.code, state.state2.blocksize, state.absmax, state.state2.absmax)

    absmax = ref.dequantize(state.absmax, state.state2.absmax, state.state2.code, state.state2.blocksize, torch.float32)
    values = F.dequantize_blockwise(codes, state)
    expected = ref.dequantize(codes, absmax + state.offset, CODES["dynamic"], 64, torch.float32)
    torch.testing.assert_close(values, expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("nested", [False, True])
def test_quant_state_survives_a_dict(nested):
    x = data(40, 50, dtype=torch.bfloat16)
    codes, state = F.quantize_blockwise(x, blocksize=64, nested=nested)
    as_dict = state.as_dict()
    assert {"absmax", "quant_map", "blocksize", "dtype", "shape", "quant_type"} <= as_dict.keys()
    assert nested == ("nested_absmax" in as_dict)
    copy = QuantState.from_dict(as_dict, device=torch.device("cpu"))
    assert torch.equal(F.dequantize_blockwise(codes, copy), F.dequantize_blockwise(codes, state))
    assert (copy.blocksize, copy.dtype, copy.nested) == (64, torch.bfloat16, nested)

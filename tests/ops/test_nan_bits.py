"""Whatever NaN comes out of an operator, it is the one that a GPU makes: 7FFFFFFF, or 7FFF of 16 bits.

Kernels for CPUs and the simulator's would otherwise give what their instructions make of a NaN: 0 * infinity has a sign
there, and what an operand is passes on.
"""

import math

import pytest
import torch
from torch import Tensor

from bnbops.functional import create_dynamic_map, get_4bit_type
from cases.backends import on_every_backend
from cases.quantize_4bit import types
from cases.rules import DTYPES, every_case, usual
from reference import quantize_4bit as ref
from reference.group import random_group
from reference.rules import RULES

pytestmark = on_every_backend

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ops = torch.ops.bnbops
INF = math.inf
NANS = torch.tensor([0x7FC00000, 0x7F812345, -0x400000, -0x7EDCBB], dtype=torch.int32).view(torch.float32)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def with_the_one_nan(x: Tensor) -> Tensor:
    """The bits of x, those of NaN as they ought to be."""
    right = 0x7FFFFFFF if x.dtype == torch.float32 else 0x7FFF
    return torch.where(x.isnan(), right, bits(x))


def assert_right(actual: Tensor, expected: Tensor) -> None:
    """`expected` is of plain torch, NaN wherever there ought to be one."""
    assert expected.isnan().any(), "this case shows nothing"
    assert torch.equal(bits(actual), with_the_one_nan(expected.to(actual.dtype)))


# ---- decoding --------------------------------------------------------------------------------------------------

SCALES = torch.cat([torch.tensor([INF, -INF, 0.0, 1.5]), NANS])


@dtypes
@pytest.mark.parametrize("blocksize", [63, 64, 256, 4352])
def test_blocks(dtype, blocksize):
    """Scales and entries that are infinite, zero or NaN, in every combination."""
    code = create_dynamic_map()
    code[3], code[250], code[5:9] = -INF, INF, NANS
    A = torch.arange(len(SCALES) * blocksize).mul(7).to(torch.uint8)
    expected = code[A.long()] * SCALES.repeat_interleave(blocksize)
    assert_right(ops.dequantize_blockwise(A, SCALES, code, blocksize, dtype), expected)
    out = torch.empty(A.shape, dtype=dtype)
    ops.dequantize_blockwise.out(A, SCALES, code, blocksize, dtype, out=out)
    assert_right(out, expected)


@types
@dtypes
def test_4bit_weights(dtype, quant_type):
    """Plain and nested scales, whole tensors and rows, which begin within a byte."""
    rows, columns, blocksize = 8 * len(SCALES), 37, 32
    numel = rows * columns
    packed = torch.arange((numel + 1) // 2).mul(7).to(torch.uint8)
    codes = ref.unpack(packed, numel, quant_type).long()
    blocks = -(-numel // blocksize)
    nested = {
        "nested_absmax": SCALES[torch.arange(-(-blocks // 4)) % len(SCALES)],
        "nested_code": create_dynamic_map(),
        "nested_offset": torch.tensor(0.25),
        "nested_blocksize": 4,
    }
    inner = torch.arange(blocks).mul(91).to(torch.uint8)
    nested_scales = nested["nested_code"][inner.long()] * nested["nested_absmax"].repeat_interleave(4)[:blocks] + 0.25
    for absmax, scales, options in (
        (SCALES[torch.arange(blocks) % len(SCALES)],) * 2 + ({},),
        (inner, nested_scales, nested),
    ):
        expected = get_4bit_type(quant_type)[codes] * scales.repeat_interleave(blocksize)[:numel]
        expected, shape, indices = expected.view(rows, columns), [rows, columns], torch.arange(rows)
        assert_right(ops.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype, **options), expected)
        looked_up = ops.embedding_4bit(indices, packed, absmax, shape, blocksize, quant_type, dtype, **options)
        assert_right(looked_up, expected)


@pytest.mark.parametrize("columns", [5, 300, 1100])
def test_int8_rows(columns):
    """An infinite scale makes no NaN, but a NaN does, of a code of 0, too."""
    A = torch.arange(len(SCALES) * columns).mul(3).to(torch.int8).view(len(SCALES), columns)
    finite = SCALES.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    assert_right(ops.int8_vectorwise_dequant(A, SCALES), A * finite[:, None] * (1 / 127))


@dtypes
def test_int8_products(dtype):
    """NaN in the scales of rows, of columns, and in the bias."""
    A, B = torch.full((6, 48), 3, dtype=torch.int8), torch.full((40, 48), -2, dtype=torch.int8)
    rows, columns, bias = torch.full((6,), 127.0), torch.full((40,), 127.0), torch.zeros(40)
    rows[:4], columns[7:11], bias[20:24] = NANS, NANS, NANS
    expected = -288.0 * (rows / 127)[:, None] * (columns / 127) + bias
    sums = ops.int8_linear_matmul(A, B)
    assert_right(ops.int8_mm_dequant(sums, rows, columns, dtype, bias), expected)
    assert_right(ops.int8_scaled_mm(A, B, rows, columns, bias, dtype), expected)


@dtypes
def test_int8_layers(dtype):
    """Outliers multiply weights of a NaN scale, too."""
    x, weight, scales = torch.ones(3, 48), torch.full((40, 48), 127, dtype=torch.int8), torch.ones(40)
    x[:, 5], scales[7:11] = 8.0, NANS
    expected = (x @ torch.ones(48, 40)) * scales
    for threshold in (0.0, 6.0):
        y = ops.linear_int8(x.to(dtype), weight, scales, None, threshold)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(bits(y), with_the_one_nan(y))


# ---- optimizer steps -------------------------------------------------------------------------------------------


@dtypes
@every_case
def test_parameters_and_states(rule, codec, dtype):
    """NaN in the parameter or a state makes more of it, or the element is left alone: it is the one NaN either way."""
    group = random_group(rule, [(5, 300), (3, 7)], **codec, dtype=dtype)
    for param in group.params:
        param.view(-1)[:4] = NANS.to(dtype)
        bits(param).view(-1)[4] = -1
        param.view(-1)[5] = INF
    group.grads[0].view(-1)[2:4] = math.nan
    states = [tensors[0] for name, tensors in group.lists().items() if name in RULES[rule].states]
    for i, state in enumerate(states):
        if codec["bits"] == 32:
            state.view(-1)[10 + 10 * i : 14 + 10 * i] = NANS
            state.view(-1)[14 + 10 * i] = INF
    group.step(usual(rule))
    assert group.params[0].view(-1)[:4].isnan().all()
    for x in [*group.params, *(state for state in states if codec["bits"] == 32)]:
        assert torch.equal(bits(x), with_the_one_nan(x))


@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule].states])
def test_scales_of_states(rule):
    """Of a spoiled checkpoint: the bits of a NaN change nothing, and no scale stays one."""
    results = []
    for nan in NANS:
        group = random_group(rule, [(5, 300)], bits=8)
        for scales in group.absmax.values():
            scales[0].view(-1)[1], scales[0].view(-1)[2] = nan, INF
        group.step(usual(rule))
        assert all(scales[0].isfinite().all() for scales in group.absmax.values())
        results.append([x.reshape(-1).view(torch.uint8) for tensors in group.lists().values() for x in tensors])
    for same in zip(*results, strict=True):
        assert all(torch.equal(x, same[0]) for x in same)

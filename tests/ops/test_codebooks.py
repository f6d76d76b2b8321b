"""The maps against bitsandbytes' bytes and against what they mean (reference/quantize.py)."""

import pytest
import torch

from bnbops.functional import create_dynamic_map, create_fp8_map, create_linear_map
from reference import quantize as ref

MAPS = {
    "map.dynamic_signed": (lambda: create_dynamic_map(True), lambda: ref.dynamic_map(True)),
    "map.dynamic_unsigned": (lambda: create_dynamic_map(signed=False), lambda: ref.dynamic_map(False)),
    "map.create_linear_map": (create_linear_map, lambda: ref.linear_map(True)),
    "map.create_fp8_map": (create_fp8_map, ref.fp8_map),
}


@pytest.mark.parametrize("name", MAPS)
def test_default_maps_have_bitsandbytes_bits(name, golden):
    expected = golden("blockwise8_64x97.safetensors")[name]
    actual = MAPS[name][0]()
    assert actual.dtype == torch.float32
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("name", MAPS)
def test_default_maps_mean_what_they_should(name):
    actual, expected = (make().double() for make in MAPS[name])
    # The maps were built in fp32: a few roundings of a value, except that the linear one sums numbers up to 1.
    rtol, atol = (0, 2**-24) if "linear" in name else (3 * 2**-24, 0)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


SIGNS, BITS = (True, False), range(4, 9)
VARIANTS = {  # name: (function, arguments, is signed, bits)
    **{f"dynamic-{s}-{e}-{b}": (create_dynamic_map, (s, e, b), s, b) for s in SIGNS for b in BITS for e in range(1, b)},
    **{f"linear-{s}-{b}-{z}": (create_linear_map, (s, b, z), s, b) for s in SIGNS for b in BITS for z in SIGNS},
    **{f"fp8-True-{e}-{b}": (create_fp8_map, (True, e, b - 1 - e, b), True, b) for b in BITS for e in range(2, b - 1)},
    **{f"fp8-False-{e}-{b}": (create_fp8_map, (False, e, b - e, b), False, b) for b in BITS for e in range(2, b)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_map_can_be_used_as_a_code(name):
    make, args, signed, bits = VARIANTS[name]
    code = make(*args)
    assert code.shape == (256,) and code.dtype == torch.float32
    assert (code.diff() >= 0).all(), "not sorted"
    assert code.max() == 1.0 and code.min() >= -1.0
    assert (code == 0).any() or (make is create_linear_map and args == (True, 8, False)), "no zero"
    assert signed == bool((code < 0).any())
    assert len(code.unique()) <= 2**bits
    codes, absmax = torch.ops.bnbops.quantize_blockwise(code, code, 256)
    assert absmax.item() == 1.0
    assert torch.equal(code[codes.long()], code)


@pytest.mark.parametrize(("exponent_bits", "total_bits"), [(8, 8), (11, 8), (6, 4)])
def test_dynamic_maps_lack_decades_without_codes(exponent_bits, total_bits):
    """Those that are left hold what they hold in a map of just as many: a code each in the lowest one."""
    code = create_dynamic_map(True, exponent_bits, total_bits)
    assert torch.equal(code, create_dynamic_map(True, total_bits - 1, total_bits))
    assert len(code.unique()) == 2**total_bits


def test_a_float_format_beyond_float32():
    """8 bits of exponent and nothing else: powers of two up to 2^128, over the largest of them."""
    code = create_fp8_map(signed=False, exponent_bits=8, precision_bits=0)
    assert code[-150:].tolist() == [2.0**exponent for exponent in range(-149, 1)]
    assert not code[:-150].any()


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (create_dynamic_map, {"total_bits": 9}),
        (create_dynamic_map, {"total_bits": 0}),
        (create_dynamic_map, {"signed": False, "max_exponent_bits": 8}),
        (create_dynamic_map, {"max_exponent_bits": 0}),
        (create_dynamic_map, {"max_exponent_bits": -1}),
        (create_linear_map, {"total_bits": 9}),
        (create_linear_map, {"total_bits": 0}),
        (create_fp8_map, {"exponent_bits": 5, "precision_bits": 3}),
        (create_fp8_map, {"signed": False}),
        (create_fp8_map, {"exponent_bits": 7, "precision_bits": 2, "total_bits": 10}),
    ],
)
def test_bad_arguments(make, kwargs):
    with pytest.raises(ValueError, match="bits"):
        make(**kwargs)

"""4-bit code tables and quantization against bitsandbytes' golden files and against their definition."""

import pytest
import torch
from torch import Tensor

import bnbops.functional as F
from bnbops.facts import FORMATS
from bnbops.functional import QuantState
from cases import backends
from cases.quantize_4bit import data, same_bits
from reference import quantize as ref8
from reference import quantize_4bit as ref

pytestmark = [pytest.mark.every_torch, backends.on_every_backend]

GOLDEN_TYPES = ("nf4", "fp4")  # bitsandbytes' own

# ---- code tables -----------------------------------------------------------------------------------------------


def test_tables_are_what_they_are_said_to_be():
    """NF4: the normal distribution's quantiles, in fp32 (1e-6); FP4: its bits' values, divided by 12."""
    assert torch.equal(F.get_4bit_type("nf4"), ref.TABLES["nf4"])
    torch.testing.assert_close(F.get_4bit_type("nf4").double(), ref.nf4(), rtol=0, atol=1e-6)
    assert torch.equal(F.get_4bit_type("fp4"), ref.fp4().float())
    assert same_bits(F.get_4bit_type("fp4")[8], torch.tensor(0.0))
    assert torch.equal(F.get_4bit_type("int4"), torch.tensor([*range(7, -1, -1), *range(0, -8, -1)]) / 7)
    af4 = F.get_4bit_type("af4")
    assert (af4.diff() < 0).all() and af4[8] == 0 and (af4[0], af4[15]) == (1, -1)


@pytest.mark.parametrize("quant_type", GOLDEN_TYPES)
def test_tables_are_bitsandbytes_tables(quant_type, golden):
    expected = golden(f"w4_{quant_type}_sq_33x65_float32.safetensors")["state_dict.weight.quant_map"]
    assert same_bits(F.get_4bit_type(quant_type), expected)


def test_every_format_is_tested():
    """Each that the library has; the reference's tables are written from the formats' definitions."""
    assert list(FORMATS) == list(ref.TABLES)


def test_a_table_is_the_callers_to_change():
    F.get_4bit_type("nf4").zero_()
    assert torch.equal(F.get_4bit_type("nf4"), ref.TABLES["nf4"])
    _, state = F.quantize_nf4(data(64))
    state.code.zero_()
    assert torch.equal(F.get_4bit_type("nf4"), ref.TABLES["nf4"])


def test_tables_go_where_tensors_go_by_default():
    assert F.get_4bit_type("nf4").device == torch.device("cpu")
    with torch.device("meta"):
        assert F.get_4bit_type("nf4").is_meta
        assert F.get_4bit_type("nf4", device="cpu").device == torch.device("cpu")


@pytest.mark.parametrize(("name", "blocksize"), [("nf8", 64), ("NF4", 64), ("af4", 128)])
def test_unknown_tables_are_refused(name, blocksize):
    with pytest.raises(NotImplementedError, match="af4"):
        F.get_4bit_type(name, blocksize=blocksize)


def test_normal_map_is_nf4_in_256_entries():
    values = F.create_normal_map()
    assert values.shape == (256,) and (values.diff() >= 0).all()
    torch.testing.assert_close(values.unique(), ref.TABLES["nf4"], rtol=0, atol=1e-7)
    symmetric = F.create_normal_map(use_extra_value=False)
    assert symmetric.unique().numel() == 15 and torch.equal(symmetric, -symmetric.flip(0))
    with pytest.raises(ValueError, match="offset must be between"):
        F.create_normal_map(offset=1.0)


# ---- bitsandbytes' golden files --------------------------------------------------------------------------------

GOLDEN = [
    *(f"{t}_{s}_33x65_{d}" for t in GOLDEN_TYPES for s in ("sq", "dq") for d in ("float32", "bfloat16")),
    *(f"{t}_{s}_100x64_bfloat16" for t in GOLDEN_TYPES for s in ("sq", "dq")),
    "nf4_dq_256x128_float32",
]


def golden_state(g: dict[str, Tensor]) -> QuantState:
    prefix = "state_dict.weight."
    return QuantState.from_dict({k.removeprefix(prefix): v for k, v in g.items() if prefix in k}, device="cpu")


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name, golden):
    """Packed codes equal bitsandbytes' byte for byte; so do scales, but for its 8-bit encoder (golden/README.md)."""
    g, (quant_type, statistics, *_) = golden(f"w4_{name}.safetensors"), name.split("_")
    packed, state = F.quantize_4bit(g["in.weight"], quant_type=quant_type, compress_statistics=statistics == "dq")
    expected = golden_state(g)
    assert torch.equal(packed, g["state_dict.weight"])
    assert torch.equal(state.code, expected.code) and state.shape == expected.shape and state.dtype == expected.dtype
    assert (state.blocksize, state.quant_type, state.nested) == (64, quant_type, statistics == "dq")
    if not state.nested:
        assert torch.equal(state.absmax, expected.absmax)
        return
    assert state.offset == expected.offset and state.state2.blocksize == expected.state2.blocksize == 256
    assert torch.equal(state.state2.absmax, expected.state2.absmax)
    assert torch.equal(state.state2.code, expected.state2.code)
    differ = state.absmax != expected.absmax  # two of 512 in the largest file, beside a midpoint; none in the others
    assert differ.sum() == (2 if "256x128" in name else 0)
    _, scales = ref.encode(g["in.weight"], 64, quant_type)
    on_grid = ref8.nearest_on_grid(ref8.normalised(scales - scales.mean(), 256), state.state2.code)
    assert torch.equal(on_grid, expected.absmax)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name, golden):
    """bitsandbytes' codes and scales mean what they mean there, bit for bit."""
    g = golden(f"w4_{name}.safetensors")
    assert same_bits(F.dequantize_4bit(g["state_dict.weight"], golden_state(g)), g["out.dequantized"])


@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
def test_golden_blocksizes(blocksize, golden):
    """Rows of 96 elements do not begin where blocks of 64 or 512 do. There bitsandbytes' CPU kernel takes the scale of
    block row * (96 // blocksize) + column // blocksize, which is not the element's own (golden/README.md)."""
    g = golden(f"w4_blocksize{blocksize}_64x96.safetensors")
    packed, state = F.quantize_nf4(g["in.weight"], blocksize=blocksize)
    assert torch.equal(packed, g["packed"]) and torch.equal(state.absmax, g["absmax"])
    values = F.dequantize_4bit(packed, state)
    if blocksize in (32, 4096):
        assert same_bits(values, g["out.dequantized"])
        return
    row, column = torch.arange(64)[:, None], torch.arange(96)
    codes = ref.unpack(packed, 64 * 96, "nf4").view(64, 96).long()
    mistaken = row * (96 // blocksize) + column // blocksize
    assert torch.equal(state.code[codes] * state.absmax[mistaken], g["out.dequantized"])
    right = (row * 96 + column) // blocksize
    assert torch.equal(state.code[codes] * state.absmax[right], values)

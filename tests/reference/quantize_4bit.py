"""What a packed 4-bit weight means, in plain torch.

NF4 and double quantization: T. Dettmers et al., "QLoRA" (arXiv:2305.14314), section 3. Scales and codes are computed to
the bit as the library has to (fp32, one rounding an operation); products of matrices in float64.
"""

import torch
from torch import Tensor

from bnbops.testing.references.blockwise import MAX_ABSMAX

STORAGE_DTYPES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)


def nf4() -> Tensor:
    """Quantiles of the normal distribution over the largest (float64): 8 positive ones, 7 negative ones, and zero."""
    most = 0.9677083  # the probability of the outermost value, from the authors' code
    positive = torch.special.ndtri(torch.linspace(most, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(most, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([positive, torch.zeros(1, dtype=torch.float64), negative]).sort().values
    return values / values.max()


def fp4() -> Tensor:
    """Bits s ee f over the largest (float64). Larger `ee` mean smaller values, but 0 is sub-normal: 0 and 1/16."""
    values = []
    for bits in range(8):
        exponent, fraction = bits >> 1, bits & 1
        values.append(fraction / 16 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (4 - exponent))
    return torch.tensor(values + [0.0 - x for x in values], dtype=torch.float64) / 12


def int4() -> Tensor:
    """7 down to 0 and 0 down to -7, over the largest (float64)."""
    return torch.tensor([*range(7, -1, -1), *range(0, -8, -1)], dtype=torch.float64) / 7


TABLES = {
    # QLoRA's appendix E prints these, the quantiles in a float32 computation; `nf4` agrees to 1e-6.
    "nf4": torch.tensor(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ]
    ),
    "fp4": fp4().float(),
    "int4": int4().float(),
}
ZERO = {"nf4": 7, "fp4": 0, "int4": 7}  # the code of 0.0
UNUSED = {"int4": 8}  # a second zero
LOW_FIRST = ("int4",)  # the even elements are in the lower halves of their bytes


# ---- codes -----------------------------------------------------------------------------------------------------


def encodable(x: Tensor) -> Tensor:
    """fp32, NaN as zero, infinities as the largest floats."""
    return x.float().nan_to_num(nan=0.0, posinf=MAX_ABSMAX, neginf=-MAX_ABSMAX)


def block_scales(x: Tensor, blocksize: int) -> Tensor:
    """The largest magnitude in each flat block."""
    flat = encodable(x).flatten().abs()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize))
    return padded.view(-1, blocksize).amax(dim=1) if len(flat) else flat


def spread(scales: Tensor, blocksize: int, numel: int) -> Tensor:
    """Each element's scale."""
    return scales.flatten().repeat_interleave(blocksize)[:numel]


def encode(x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Codes of the flattened tensor and the scales.

    An element takes the nearest entry to x * (1 / absmax), the smaller one in a tie. FP4 has two zeros, codes 0 and 8:
    a positive element that is nearest to zero takes 8. (So does bitsandbytes on a CPU. They mean the same.)
    """
    absmax = block_scales(x, blocksize)
    inverse = torch.where(absmax > 0, (1 / absmax).clamp(max=MAX_ABSMAX), 0.0)
    x = encodable(x).flatten()
    scaled = x * spread(inverse, blocksize, x.numel())
    values, order = TABLES[quant_type].sort(stable=True)
    values, order = (x[order != UNUSED.get(quant_type, -1)] for x in (values, order))
    if quant_type == "fp4":
        scaled = torch.where((scaled == 0) & (x > 0), 2**-149, scaled)  # the product of positive factors is positive
    midpoints = (values[1:] + values[:-1]) / 2
    return order[torch.bucketize(scaled, midpoints)].to(torch.uint8), absmax


def pack(codes: Tensor, quant_type: str, storage: torch.dtype = torch.uint8) -> Tensor:
    """Two codes a byte."""
    if codes.numel() % 2:
        codes = torch.cat([codes, torch.tensor([ZERO[quant_type]], dtype=torch.uint8)])
    low, high = codes.view(-1, 2).unbind(1) if quant_type in LOW_FIRST else codes.view(-1, 2).flip(1).unbind(1)
    return (high << 4 | low).view(storage).view(-1, 1)


def unpack(packed: Tensor, numel: int, quant_type: str) -> Tensor:
    packed = packed.reshape(-1).view(torch.uint8)
    high, low = packed >> 4, packed & 15
    return torch.stack([low, high] if quant_type in LOW_FIRST else [high, low], dim=1).flatten()[:numel]


def quantize(x: Tensor, blocksize: int, quant_type: str, storage: torch.dtype = torch.uint8) -> tuple[Tensor, Tensor]:
    codes, absmax = encode(x, blocksize, quant_type)
    return pack(codes, quant_type, storage), absmax


# ---- values ----------------------------------------------------------------------------------------------------


def scales(
    absmax: Tensor,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    """The flat fp32 scales; of a doubly quantized weight, each product and each sum rounded."""
    if nested_absmax is None:
        return absmax.flatten()
    product = nested_code[absmax.flatten().long()] * spread(nested_absmax, nested_blocksize, absmax.numel())
    return product + nested_offset.reshape(())


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype = torch.float32,
    **nested: Tensor | int | None,
) -> Tensor:
    """One fp32 product per element, rounded once more to `dtype`."""
    numel = torch.Size(shape).numel()
    values = TABLES[quant_type].to(packed.device)[unpack(packed, numel, quant_type).long()]
    return (values * spread(scales(absmax, **nested), blocksize, numel)).to(dtype).view(shape)


# ---- products --------------------------------------------------------------------------------------------------


def grouped(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """x [T, K], weight [E, N, K], bias [E, N] -> float64 [T, N]; rows after the last offset are zero."""
    result = torch.zeros((x.shape[0], weight.shape[1]), dtype=torch.float64)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        result[start:end] = x[start:end].double() @ weight[expert].double().t()
        if bias is not None:
            result[start:end] += bias[expert].double()
        start = end
    return result


def assert_product(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """`actual` is x [..., K] @ weight.t() [K, N] + bias up to what its dtype allows.

    `weight` is the fp32 one. An implementation may round it to x's dtype before it multiplies, adds K products in fp32
    in any order, and rounds the result.
    """
    x, weight = x.double(), weight.double()
    expected, magnitude = x @ weight.t(), x.abs() @ weight.abs().t()
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    unit, single = torch.finfo(actual.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    assert actual.shape == expected.shape
    terms = 1 + x.shape[-1]
    allowed = unit * (magnitude + expected.abs()) + terms * single * magnitude + torch.finfo(actual.dtype).tiny
    excess = ((actual.double() - expected).abs() - allowed).clamp(min=0)
    assert not excess.isnan().any() and (excess == 0).all(), f"off by {excess.max():.3g} more than allowed"

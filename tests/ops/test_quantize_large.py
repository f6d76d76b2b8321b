"""Large inputs take a bucketed search instead of a binary one: same codes, compared with torch.bucketize."""

import pytest
import torch
from torch import Tensor

import bnbops.functional as F

CODES = {
    "linear": F.create_linear_map(),
    "unsigned linear": F.create_linear_map(signed=False),
    "4-bit linear": F.create_linear_map(total_bits=4),
    "fp8": F.create_fp8_map(),
    "unsigned fp8": F.create_fp8_map(signed=False, precision_bits=3),
    "crowded": torch.linspace(0.5, 0.5 + 2**-10, 256),  # many midpoints in one bucket: the binary search after all
}


def awkward_values(code: Tensor) -> Tensor:
    """Normalised values of every magnitude, and all midpoints with their neighbours; the block's largest is 1."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x3F800000, (1 << 19,), generator=generator, dtype=torch.int32)
    anywhere = bits.view(torch.float32)
    midpoints = 0.5 * code[:-1] + 0.5 * code[1:]
    near = [torch.nextafter(midpoints, torch.tensor(to)) for to in (-2.0, 2.0)]
    tiny = torch.rand(1 << 18, generator=generator) * 1e-9
    return torch.cat([anywhere, -anywhere, tiny, -tiny, midpoints, *near, code, torch.tensor([1.0])]).clamp(-1, 1)


@pytest.mark.parametrize("name", CODES)
def test_codes_equal_bucketize(name):
    code = CODES[name]
    values = awkward_values(code)
    codes, absmax = torch.ops.bnbops.quantize_blockwise(values, code, values.numel())
    assert absmax.tolist() == [1.0]
    expected = torch.bucketize(values, 0.5 * code[:-1] + 0.5 * code[1:]).to(torch.uint8)
    assert torch.equal(codes, expected)

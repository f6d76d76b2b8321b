"""Quantization functions with bitsandbytes' names and signatures, over `torch.ops.bnbops`."""

from bnbops.codebooks import create_dynamic_map, create_fp8_map, create_linear_map, create_normal_map
from bnbops.functional.blockwise import dequantize_blockwise, quantize_blockwise
from bnbops.functional.four_bit import (
    dequantize_4bit,
    dequantize_fp4,
    dequantize_nf4,
    gemv_4bit,
    get_4bit_type,
    quantize_4bit,
    quantize_fp4,
    quantize_nf4,
)
from bnbops.functional.int8 import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from bnbops.functional.optimizer import optimizer_update_8bit_blockwise, optimizer_update_32bit
from bnbops.functional.quant_state import QuantState

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "has_avx512bf16",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]


def has_avx512bf16() -> bool:
    """Whether 4-bit layers repack their weights for this CPU when they evaluate, which bitsandbytes does if it has
    AVX512-BF16: never."""
    return False

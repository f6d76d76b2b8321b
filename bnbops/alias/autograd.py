"""`bitsandbytes.autograd._functions`: its autograd classes are functions here."""

from torch import Tensor

from bnbops.functional.four_bit import matmul_4bit
from bnbops.functional.int8 import MatmulLtState, matmul
from bnbops.functional.quant_state import QuantState

__all__ = ["MatMul4Bit", "MatMul8bitFp", "MatMul8bitLt", "MatmulLtState", "matmul", "matmul_4bit"]
__path__ = []  # a package, as bitsandbytes' is


class MatMul4Bit:
    """`apply` only: gradients are the operator's own."""

    @staticmethod
    def apply(
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> Tensor:
        """`bnbops.matmul_4bit`."""
        return matmul_4bit(A, B, quant_state, out, bias)


class MatMul8bitLt:
    """`apply` only: gradients are the operator's own."""

    @staticmethod
    def apply(
        A: Tensor, B: Tensor, out: Tensor | None = None, bias: Tensor | None = None, state: MatmulLtState | None = None
    ) -> Tensor:
        """`bnbops.matmul`."""
        return matmul(A, B, out, state, bias=bias)


MatMul8bitFp = MatMul8bitLt  # one computation on all devices

"""Fake kernels: what `torch.compile` and FakeTensor see of the operators. One module a family.

They compute shapes and dtypes, and refuse by shape or dtype what the real kernels refuse.
"""

from . import autograd, blockwise, four_bit, int8, optimizer

__all__ = ["autograd", "blockwise", "four_bit", "int8", "optimizer"]

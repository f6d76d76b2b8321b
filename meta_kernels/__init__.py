"""Fake kernels: what `torch.compile` and FakeTensor see of the operators. One module a family.

They compute shapes and dtypes, and refuse by shape or dtype what the real kernels refuse.
"""

from . import blockwise, int8, linear_4bit, norms, optimizer, quantize_4bit

__all__ = ["blockwise", "int8", "linear_4bit", "norms", "optimizer", "quantize_4bit"]

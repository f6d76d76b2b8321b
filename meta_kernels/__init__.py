"""Fake kernels: what `torch.compile` and FakeTensor see of the operators. One module a family.

They compute shapes and dtypes, and refuse by shape or dtype what the real kernels refuse.
"""

from . import blockwise, norms, optimizer

__all__ = ["blockwise", "norms", "optimizer"]

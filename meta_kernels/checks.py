"""The shape and dtype checks of csrc/core/check.cpp, for tensors without data."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"bnbops::{message}")


def check_float(what: str, tensor: Tensor) -> None:
    check(tensor.dtype in FLOAT_DTYPES, f"{what} must be float32, bfloat16 or float16, got {name_of(tensor.dtype)}")


def check_dtype(what: str, tensor: Tensor, dtype: torch.dtype) -> None:
    check(tensor.dtype == dtype, f"{what} must be {name_of(dtype)}, got {name_of(tensor.dtype)}")


def check_scales(what: str, tensor: Tensor) -> None:
    fits, found = tensor.dtype in (torch.float32, torch.int32), name_of(tensor.dtype)
    check(fits, f"{what} must be float32, or int32 for the bits of float32, got {found}")


def check_device(what: str, tensor: Tensor, other: Tensor) -> None:
    check(tensor.device == other.device, f"{what} is on another device than the first tensor")


def check_contiguous(what: str, tensor: Tensor) -> None:
    check(tensor.is_contiguous(), f"{what} must be contiguous; call .contiguous() first")


def check_not_expanded(what: str, tensor: Tensor) -> None:
    expanded = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    check(not expanded, f"{what} is expanded; its elements need memory of their own")


def check_one_element(what: str, tensor: Tensor) -> None:
    check(tensor.numel() == 1, f"{what} must have one element, got shape {list(tensor.shape)}")

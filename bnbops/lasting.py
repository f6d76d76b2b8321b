"""Global settings of torch: those that must not reach what outlasts a call, and what autocast does to a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def lasting(parameter: Tensor | None = None) -> Iterator[None]:
    """Makes ordinary tensors in inference mode, too, and none that autograd knows of.

    What is made in inference mode can neither be saved for a backward pass nor changed in place once that has ended: a
    model that is quantized in it could not be trained afterwards. Data for a `parameter` that was made in inference
    mode are made in it, too, since torch cannot mix the two.
    """
    with torch.inference_mode(parameter is not None and parameter.is_inference()), torch.no_grad():
        yield


@contextmanager
def usual_settings() -> Iterator[None]:
    """`lasting`, and no default device but the CPU: for functions of torch's that make tensors of their own."""
    with lasting(), torch.device("cpu"):
        yield


def is_autocast(device: str) -> bool:
    """Whether a kind of device is under autocast; some, such as "meta", know of none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def to_autocast_dtype(x: Tensor, device: str) -> Tensor:
    """As torch.nn.functional.linear takes it under a device's autocast."""
    castable = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if castable else x

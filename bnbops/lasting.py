"""Global settings of torch that must not reach what is made in a call, and outlasts it."""

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

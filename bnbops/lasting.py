"""Tensors that outlast the call that makes them: parameters, scales, optimizer states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def lasting() -> Iterator[None]:
    """Makes ordinary tensors in inference mode, too, and none that autograd knows of.

    What is made in inference mode can neither be saved for a backward pass nor changed in place once that has ended: a
    model that is quantized in it could not be trained afterwards.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield

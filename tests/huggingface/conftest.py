"""No test here reaches a network."""

import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import pytest

import bnbops

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def as_bitsandbytes() -> Iterator[ModuleType]:
    """The module `bitsandbytes`, which bnbops is installed as."""
    bnbops.install_as_bitsandbytes()
    try:
        yield importlib.import_module("bitsandbytes")
    finally:
        bnbops.uninstall_as_bitsandbytes()

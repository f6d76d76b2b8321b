"""No test here reaches a network."""

import importlib
import os
import sys
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


@pytest.fixture(autouse=True)
def _peft_as_it_is() -> None:
    """Takes back what importing `bnbops.integrations.peft`, here or in another file, has registered."""
    if (integration := sys.modules.get("bnbops.integrations.peft")) is not None:
        integration.unregister()


@pytest.fixture
def registered_with_peft(_peft_as_it_is: None) -> Iterator[None]:
    """As after `import bnbops.integrations.peft` in a program."""
    integration = importlib.import_module("bnbops.integrations.peft")
    integration.register()
    yield
    integration.unregister()

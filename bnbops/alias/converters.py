"""What Transformers' converters for bitsandbytes lack."""

from types import ModuleType


def add(module: ModuleType) -> None:
    """To `transformers.integrations.bitsandbytes`."""

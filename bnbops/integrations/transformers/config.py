"""BnbOpsConfig: the options of `bnbops.nn.quantize_` as a quantization config of Transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from bnbops.facts import name_of
from bnbops.nn.kinds import kind_of
from bnbops.nn.weights.quantization import Quantization

METHOD = "bnbops"
_OPTIONS = (
    *("quant_method", "quant", "double_quant", "blocksize", "compute_dtype", "quant_storage", "threshold"),
    *("skip", "embeddings", "experts"),
)


class BnbOpsConfig(QuantizationConfigMixin):
    """How `from_pretrained` quantizes a model: the options of `bnbops.nn.quantize_`, with its rules.

    Args:
        quant: "nf4" or another 4-bit format (docs/linear_4bit.md), or "int8".
        double_quant: quantize the scales, too (4 bits).
        blocksize: elements that share a scale, a power of two up to 4096, at least 32 for NF4 (4 bits).
        compute_dtype: the layers cast their input to it, a dtype or its name; None for the input's own (4 bits).
        quant_storage: dtype whose bytes hold the codes, or its name (4 bits).
        threshold: magnitude from which on a column of the input is computed in floating point (int8).
        skip: names of modules to leave, with all in them, or patterns of names; the output head by default. `[]`
            quantizes it, too.
        embeddings: quantize embeddings, too. An embedding that is tied to the head shares one quantized weight with it
            if the head is not skipped, and is left otherwise.
        experts: quantize fused experts `[experts, out, in]`, too (4 bits).

    Raises:
        ValueError: an option that does not exist, or not for this `quant`.
        TypeError: an option of another type.
    """

    def __init__(
        self,
        quant: str = "nf4",
        *,
        double_quant: bool = True,
        blocksize: int = 64,
        compute_dtype: torch.dtype | str | None = None,
        quant_storage: torch.dtype | str = torch.uint8,
        threshold: float = 6.0,
        skip: str | Iterable[str] | None = None,
        embeddings: bool = False,
        experts: bool = True,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = [name for name in _OPTIONS if name != "quant_method"]
            raise ValueError(
                f"BnbOpsConfig has no option {', '.join(sorted(unknown))}; it has {', '.join(known)}. A config.json "
                "may come from a later version of bnbops"
            )
        if quant_method != METHOD:
            raise ValueError(f"the quantization config is of method {quant_method!r}, expected {METHOD!r}")
        self.quant_method = METHOD
        self.quant = quant
        self.double_quant = double_quant
        self.blocksize = blocksize
        self.compute_dtype = None if compute_dtype is None else _dtype("compute_dtype", compute_dtype)
        self.quant_storage = _dtype("quant_storage", quant_storage)
        self.threshold = threshold
        self.skip = [skip] if isinstance(skip, str) else skip
        self.embeddings = embeddings
        self.experts = experts
        self._check()

    def _check(self) -> None:
        for name in ("double_quant", "embeddings", "experts"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if type(self.blocksize) is not int:
            raise TypeError(f"blocksize must be an integer, got {self.blocksize!r}")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise TypeError(f"threshold must be a number, got {self.threshold!r}")
        if self.skip is not None:
            if callable(self.skip) or not isinstance(self.skip, Iterable):
                raise TypeError(
                    f"skip must be names or patterns of modules, which config.json can hold, got {self.skip!r}"
                )
            self.skip = list(self.skip)
            if odd := [name for name in self.skip if not isinstance(name, str)]:
                raise TypeError(f"skip must hold names or patterns of modules, got {odd[0]!r} in it")
        self.quantization.check()

    @property
    def quantization(self) -> Quantization:
        """What makes quantized layers."""
        options = (self.double_quant, self.blocksize, self.compute_dtype, self.quant_storage, float(self.threshold))
        return kind_of(self.quant)(self.quant, *options)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; `BnbOpsConfig(**to_dict())` is equal to this one."""
        values = {name: getattr(self, name) for name in _OPTIONS}
        for name in ("compute_dtype", "quant_storage"):
            if values[name] is not None:
                values[name] = name_of(values[name])
        return values | {"skip": None if self.skip is None else list(self.skip)}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BnbOpsConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # mutable

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """As in Transformers: takes the options among the arguments, checked, and returns the others."""
        options = {name: value for name, value in kwargs.items() if name in _OPTIONS}
        vars(self).update(vars(BnbOpsConfig(**(self.to_dict() | options))))
        return {name: value for name, value in kwargs.items() if name not in options}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config


def _dtype(option: str, value: torch.dtype | str) -> torch.dtype:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{option} must be a torch dtype or its name, got {value!r}")
    return dtype

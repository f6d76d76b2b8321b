"""quantize_: a model's linear layers, embeddings and expert weights to 4 or 8 bits, in place."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from bnbops.nn.convert.materialize import Change, Sources, check_sources, load_others, read
from bnbops.nn.convert.places import find, places_by_tensor
from bnbops.nn.convert.plan import SHARDED, QuantizationPlan, Skip, quantization_plan
from bnbops.nn.convert.replace import quantizing
from bnbops.nn.convert.resizing import guard_resizing
from bnbops.nn.convert.sources import open_state
from bnbops.nn.kinds import kind_of
from bnbops.nn.weights.module import is_quantized
from bnbops.nn.weights.quantization import Quantization

State = Mapping[str, Tensor] | str | os.PathLike[str]


def quantize_(
    model: nn.Module,
    quant: str = "nf4",
    *,
    skip: Skip | None = None,
    double_quant: bool = True,
    blocksize: int = 64,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
    threshold: float = 6.0,
    embeddings: bool = False,
    experts: bool = True,
    state: State | None = None,
    device: torch.device | str | int | None = None,
    progress: bool = True,
) -> nn.Module:
    """Converts a model's linear layers to 4 or 8 bits, in place, one after the other.

    Every plain `nn.Linear` becomes a `Linear4bit` or `Linear8bitLt` that keeps its bias, its mode and its forward and
    backward hooks, and so does Transformers' `Conv1D`, a linear layer. `quantization_plan` tells beforehand what will
    be converted and what will be left. Left are: what `skip` names; what is quantized already; subclasses of
    `nn.Linear`; weights that are computed, parametrized, of another dtype than fp32, bf16 and fp16, or shared with
    anything that cannot share a quantized one. Layers that share their weight share it afterwards. A warning names
    linear layers that are left for other reasons than `skip`.

    With `state` the weights come from there, one at a time: only the quantized ones stay, so that a model on the meta
    device takes little more memory than it has in the end. A model on the meta device without `state` gets quantized
    layers there, for `load_state_dict(..., assign=True)`, or for `fully_shard`, `to_empty` and a sharded state dict.

    Args:
        model: a module that holds linear layers, and is not one itself.
        quant: "nf4" or another 4-bit format (docs/linear_4bit.md), or "int8".
        skip: names of modules to leave, with all in them, such as "lm_head" or "layers.0"; patterns of them, "*" being
            any text; or a function of a name and its module. The output head by default: a module called "lm_head", and
            what `get_output_embeddings()` of a model in Transformers gives.
        double_quant: quantize the scales, too (4 bits).
        blocksize: elements that share a scale, a power of two up to 4096, at least 32 for NF4 (4 bits).
        compute_dtype: the layers cast their input to it (4 bits).
        quant_storage: dtype whose bytes hold the codes (4 bits).
        threshold: magnitude from which on a column of the input is computed in floating point (int8).
        embeddings: convert each plain `nn.Embedding`, too, to `Embedding4bit` or `Embedding8bit`.
        experts: convert floating 3-D parameters `[experts, out, in]`, too (4 bits): those of modules that are not
            torch's own, with "expert" in the parameter's full name or in the name of the module's class. They become
            parametrizations (`replace_parameter_4bit`).
        state: all weights of the model, whose values are cast to the model's dtypes: a mapping from name to tensor; or
            the path of a safetensors file, of the JSON index of a sharded one, or of a file by `torch.save`.
        device: for the whole model; everything stays on its device by default (on "cpu" what comes from `state` and has
            been on the meta device).
        progress: show a progress bar if tqdm is installed.

    Returns:
        The model.

    Raises:
        TypeError: no module, or a `state` or `skip` of another type.
        ValueError: an option that does not exist, or not for this `quant`; a name in `skip` that matches nothing; a
            `state` that lacks tensors, or has others or of other shapes; a weight that has NaN or infinite values, or
            is sharded.
        OSError: a file of `state` cannot be read.

    All this is found out before the model is changed. If memory runs out, layers may have been converted; a second
    call goes on with the rest. With `state` the model is as it was.
    """
    plan = quantization_plan(model, quant, skip=skip, embeddings=embeddings, experts=experts)
    options = (double_quant, blocksize, compute_dtype, quant_storage, float(threshold))
    quantization = kind_of(quant)(quant, *options)
    sources = None if state is None else open_state(state)
    device = None if device is None else torch.device(device)
    names = _check(model, plan, quantization, sources)

    changes: list[Change] = []
    if sources is not None:
        changes += load_others(model, sources, {name for group in names for name in group}, device)
    for group in _with_progress(names, quant, progress):
        change = quantizing(model, group, _read(model, group, quantization, sources, device), quantization)
        if sources is None:
            change()  # at once, which frees the float weight
            del change
        else:
            changes.append(change)
    for change in changes:
        change()
    _avoid_fused_layers(model)
    guard_resizing(model)
    return model if device is None else model.to(device)


def _check(
    model: nn.Module, plan: QuantizationPlan, quantization: Quantization, sources: Sources | None
) -> list[list[str]]:
    """Finds out what may go wrong. Returns the names of the weights to convert: names, since to hold a weight would
    keep its memory; a list for each, since a shared one has several."""
    quantization.check()
    if sharded := [name for name, reason in plan.leave.items() if reason == SHARDED]:
        raise ValueError(f"{', '.join(sharded)}: {SHARDED}")
    if sources is not None:
        check_sources(sources, model)
    shared = places_by_tensor(model).values()
    groups = [places for places in shared if places[0].kind and places[0].subject in plan.convert]
    for place, *_ in groups:
        quantization.check_weight(place)
        if sources is None and not place.tensor.is_meta:
            quantization.check_values(place.name, place.tensor)
    if plan.unasked:
        reasons = "\n".join(f"  {name}: {plan.leave[name]}" for name in plan.unasked)
        warnings.warn(f"quantize_ leaves these as they are:\n{reasons}", stacklevel=3)
    return [[place.name for place in places] for places in groups]


def _read(
    model: nn.Module, names: list[str], quantization: Quantization, sources: Sources | None, device: torch.device | None
) -> Tensor:
    """The float weight."""
    tensor = find(model, names[0]).tensor
    if sources is None:
        return tensor.data if device is None else tensor.data.to(device)
    data = read(names, sources, tensor, device, transient=True)
    quantization.check_values(names[0], data)
    return data


def _with_progress(names: list[list[str]], quant: str, progress: bool) -> Iterable[list[str]]:
    if not progress or not names:
        return names
    try:
        from tqdm import tqdm
    except ImportError:
        return names
    return tqdm(names, desc=f"quantize to {quant}", unit="weight")


def _avoid_fused_layers(model: nn.Module) -> None:
    """A quantized weight keeps torch's fused encoder layers off by itself; what FSDP puts in its place does not."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(map(is_quantized, module.modules())):
            module.activation_relu_or_gelu = 0  # "unknown", which rules the fused layer out

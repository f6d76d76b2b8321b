"""No result depends on torch's global settings: default dtype and device, device contexts, grad and inference mode,
autocast, determinism. They are for what a user makes and computes, not for what happens within an operation of ours."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import bnbops
from bnbops import functional as F
from bnbops import self_check
from bnbops.estimate import estimate
from bnbops.nn.parametrize import replace_parameter_4bit
from bnbops.nn.requantize import dequantized_weight, requantized_weight
from bnbops.sample import integers, normal
from optimizer_classes import CLASSES, build

# ---- the settings ----------------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN then
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], Any]] = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
}

# ---- the package's functions, on inputs that no setting touches ------------------------------------------------


def codebooks() -> Any:
    maps = [F.create_dynamic_map(), F.create_dynamic_map(signed=False, total_bits=6, max_exponent_bits=3)]
    maps += [F.create_linear_map(), F.create_fp8_map(), F.create_normal_map()]
    return maps + [F.get_4bit_type(name, device="cpu") for name in ("nf4", "fp4", "int4", "af4")]


def quantize_4bit() -> Any:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for nested in (False, True):
            packed, state = F.quantize_nf4(normal(64, 96).to(dtype), compress_statistics=nested)
            entries = state.as_dict(packed=True)
            again = F.QuantState.from_dict(entries, device="cpu")
            out = torch.zeros_like(F.dequantize_4bit(packed, state))
            results += [packed, entries, F.dequantize_4bit(packed, again), F.dequantize_nf4(packed, again, out=out)]
    return results


def quantize_blockwise() -> Any:
    results = []
    for nested in (False, True):
        codes, state = F.quantize_blockwise(normal(9, 1000), blocksize=64, nested=nested)
        results += [codes, state.as_dict(), F.dequantize_blockwise(codes, state)]
    return results


def int8() -> Any:
    A, B = normal(5, 64), normal(7, 64, seed=1)
    (codes, rows, _), (weight, columns, _) = F.int8_vectorwise_quant(A, 2.0), F.int8_vectorwise_quant(B)
    product = F.int8_linear_matmul(codes, weight)
    result = F.int8_mm_dequant(product, rows, columns, bias=normal(7))
    return codes, rows, product, result, F.int8_double_quant(A), F.int8_vectorwise_dequant(codes, rows)


def products() -> Any:
    x, weight = normal(5, 64), normal(7, 64, seed=1)
    packed, state = F.quantize_nf4(weight, compress_statistics=True)
    return (
        bnbops.matmul_4bit(x, packed, state, bias=normal(7)),
        F.gemv_4bit(x, packed, state=state),
        bnbops.matmul(x, weight, threshold=2.0),
    )


def layers(forward: bool = True) -> Any:
    """Quantized, saved, and loaded into a layer that is quantized already and into one that is not."""
    results, fp32 = [], {"device": "cpu", "dtype": torch.float32}
    makes: list[tuple[Callable[[], nn.Module], Tensor]] = [
        *((lambda c=c: c(64, 32, **fp32), normal(3, 64)) for c in (bnbops.nn.LinearNF4, bnbops.nn.Linear8bitLt)),
        (lambda: bnbops.nn.LinearFP4(64, 32, False, torch.bfloat16, False, device="cpu"), normal(3, 64)),
        (lambda: bnbops.nn.Embedding4bit(32, 64, compress_statistics=True, **fp32), integers(0, 32, (5,), torch.int64)),
        (lambda: bnbops.nn.Embedding8bit(32, 64, **fp32), integers(0, 32, (5,), torch.int64)),
        (lambda: bnbops.nn.StableEmbedding(32, 64, **fp32), integers(0, 32, (5,), torch.int64)),
    ]
    for make, x in makes:
        layer, fresh, quantized = make(), make(), make().to("cpu")
        floats = {name: normal(*tensor.shape, seed=2) for name, tensor in layer.state_dict().items()}
        layer.load_state_dict(floats)
        layer.to("cpu")
        state = layer.state_dict()
        for other in (fresh, quantized):
            other.load_state_dict(state)
        quantized.load_state_dict(floats)
        results += [state, save({k: v.contiguous() for k, v in state.items()}), fresh.state_dict()]
        results += [quantized.state_dict(), dict(make().to("cpu").half().named_parameters()).keys()]
        results += [each(x) for each in (layer, fresh, quantized) if forward]
        if hasattr(layer, "weight_scale") or hasattr(layer, "weight_absmax"):
            results += [dequantized_weight(layer), requantized_weight(layer, normal(32, 64, seed=3)).data]
    return results


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(normal(3, 8, 64))


def parametrized() -> Any:
    module, other = Expert(), Expert()
    for each in (module, other):
        replace_parameter_4bit(each, "experts", compress_statistics=True)
    state = module.state_dict()
    other.load_state_dict(state)
    other.load_state_dict({"experts": normal(3, 8, 64, seed=1)})
    return module.experts, state, other.state_dict()


def model(device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    made = nn.Sequential(
        nn.Embedding(10, 64, device=device, dtype=dtype), nn.Linear(64, 96, device=device, dtype=dtype), Expert()
    )
    if device != "meta":
        made.load_state_dict({name: normal(*x.shape).to(dtype) for name, x in made.state_dict().items()})
    return made.to(device)


def quantized_models() -> Any:
    results = []
    for quant in ("nf4", "fp4", "int8"):
        for dtype in (torch.float32, torch.bfloat16):
            quantized = bnbops.nn.quantize_(model(dtype=dtype), quant, embeddings=True, progress=False)
            results.append(bnbops.nn.plain_state_dict(quantized) if quant == "int8" else quantized.state_dict())
        state = model().state_dict()
        empty = bnbops.nn.quantize_(model("meta"), quant, state=state, progress=False)
        fresh = bnbops.nn.quantize_(model("meta"), quant, progress=False)
        fresh.load_state_dict(empty.state_dict(), assign=True)
        results += [empty.state_dict(), fresh.state_dict()]
    return results


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=seed)) for seed, shape in enumerate([(64, 80), (80,), (30, 20)])]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, seed=10 * step + i)


def optimizer(name: str, **options: Any) -> Any:
    """Steps, the state dict, loading it, a further step."""
    params, others = parameters(), parameters()
    mine, other = build(name, params, lr=1e-2, **options), build(name, others, lr=1e-2, **options)
    for step in range(2):
        set_grads(params, step)
        mine.step()
    state = mine.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    set_grads(others, 3)
    other.step()
    return params, state, file.getvalue(), others, other.state_dict()


def interchanged(name: str) -> Any:
    """Through bitsandbytes' format."""
    params, others = parameters(), parameters()
    mine, other = build(name, params, lr=1e-2, percentile_clipping=5), build(name, others, percentile_clipping=5)
    set_grads(params, 0)
    mine.step()
    state = mine.bitsandbytes_state_dict()
    other.load_state_dict(state)
    return state, other.state_dict()


def estimates() -> Any:
    return [str(estimate(count, name)) for count in (1e6, model("meta")) for name in ("AdamW8bit", "Lion")]


def checked_operators() -> Any:
    """The samples are the same, and the references still agree."""
    names = ["quantize_blockwise", "dequantize_4bit", "linear_4bit", "linear_int8", "lamb_step_", "percentile_clip_"]
    return [(name, [self_check.check(name, sample) for sample in self_check.samples(name)]) for name in names]


CASES: dict[str, Callable[[], Any]] = {
    **{case.__name__: case for case in (codebooks, quantize_4bit, quantize_blockwise, int8, products, layers)},
    **{case.__name__: case for case in (parametrized, quantized_models, estimates, checked_operators)},
    **{name: lambda name=name: optimizer(name) for name in CLASSES},
    "AdamW8bit, clipping": lambda: optimizer("AdamW8bit", percentile_clipping=5),
    **{f"{name}, bitsandbytes' format": lambda name=name: interchanged(name) for name in ("AdamW8bit", "LAMB", "Lion")},
}


def bits(value: Any) -> Any:
    """Tensors by dtype, device, shape and bytes."""
    return tree_map_only(
        Tensor,
        lambda x: (x.dtype, x.device, x.shape, x.detach().contiguous().view(-1).view(torch.uint8).tolist()),
        value,
    )


@cache
def expected(case: str) -> Any:
    return bits(CASES[case]())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_results_do_not_depend_on(case, setting):
    wanted = expected(case)
    with SETTINGS[setting]():
        found = CASES[case]()
    assert bits(found) == wanted

"""No result depends on torch's global settings: default dtype and device, device contexts, grad and inference mode,
autocast, determinism. They are for what a user makes and computes, not for what happens within an operation of ours."""

import contextlib
import copy
import io
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

import bnbops
from bnbops import functional as F
from bnbops.estimate import estimate
from bnbops.nn.parametrize import replace_parameter_4bit
from bnbops.testing import self_check
from bnbops.testing.sample import integers, normal
from cases.global_settings import SETTINGS, bits
from cases.optimizer_classes import CLASSES, build

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


_FP32 = {"device": "cpu", "dtype": torch.float32}
_INT8 = {"has_fp16_weights": False, "threshold": 6.0, "device": "cpu"}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LinearNF4": lambda: bnbops.nn.LinearNF4(64, 32, **_FP32),
    "LinearFP4": lambda: bnbops.nn.LinearFP4(64, 32, False, torch.bfloat16, False, **_FP32),
    "Linear8bitLt": lambda: bnbops.nn.Linear8bitLt(64, 32, **_INT8).to(torch.float32),  # which has no dtype=
    "Embedding4bit": lambda: bnbops.nn.Embedding4bit(32, 64, compress_statistics=True, **_FP32),
    "Embedding8bit": lambda: bnbops.nn.Embedding8bit(32, 64, **_FP32),
}


def layers(name: str) -> Any:
    """Quantized, saved, and loaded into a layer that is quantized already and into one that is not."""
    layer, fresh, quantized = LAYERS[name](), LAYERS[name](), LAYERS[name]().to("cpu")
    floats = {name: normal(*tensor.shape, seed=2) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(floats)
    layer.to("cpu")
    state = layer.state_dict()
    results = [layer.dequantized(), layer.requantized(normal(32, 64, seed=3)).data]
    for other in (fresh, quantized):
        other.load_state_dict(state)
        results.append(other.state_dict())
    quantized.load_state_dict(floats)
    quantized.half()
    results += [state, save({k: v.contiguous() for k, v in state.items()}), quantized.state_dict()]
    return results


def products() -> Any:
    """Where activations meet weights; autocast is there to change their dtype."""
    x, weight = normal(5, 64), normal(7, 64, seed=1)
    packed, state = F.quantize_nf4(weight, compress_statistics=True)
    results = [bnbops.matmul_4bit(x, packed, state, bias=normal(7)), F.gemv_4bit(x, packed, state=state)]
    results += [bnbops.matmul(x, weight, threshold=2.0)]
    for name, make in LAYERS.items():
        layer = make()
        layer.load_state_dict({key: normal(*tensor.shape) for key, tensor in layer.state_dict().items()})
        results.append(layer.to("cpu")(integers(0, 32, (5,), torch.int64) if "Embedding" in name else x))
    return results


class Expert(nn.Module):
    """A weight that `quantize_` knows by the name of its module's class."""

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
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
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


def paged() -> Any:
    params = parameters()
    mine = bnbops.optim.PagedAdamW8bit(params, lr=1e-2, min_8bit_size=64)
    set_grads(params, 0)
    mine.init_state()
    mine.step()
    copied = copy.deepcopy(mine)
    return params, mine.state_dict(), copied.state_dict()


def estimates() -> Any:
    return [str(estimate(count, name)) for count in (1e6, model("meta")) for name in ("AdamW8bit", "Lion")]


CASES: dict[str, Callable[[], Any]] = {
    **{case.__name__: case for case in (codebooks, quantize_4bit, quantize_blockwise, int8, products)},
    **{case.__name__: case for case in (parametrized, quantized_models, paged, estimates)},
    **{name: lambda name=name: layers(name) for name in LAYERS},
    **{name: lambda name=name: optimizer(name) for name in CLASSES},
    "AdamW8bit, clipping": lambda: optimizer("AdamW8bit", percentile_clipping=5),
    **{f"{name}, bitsandbytes' format": lambda name=name: interchanged(name) for name in ("AdamW8bit", "LAMB", "Lion")},
}


@cache
def expected(case: str) -> Any:
    return bits(CASES[case]())


@pytest.mark.parametrize(
    ("case", "setting"),
    [(case, setting) for case in CASES for setting in SETTINGS if (case, setting) != ("products", "autocast")],
)
def test_results_do_not_depend_on_settings(case, setting):
    wanted = expected(case)
    with SETTINGS[setting]():
        found = CASES[case]()
    assert bits(found) == wanted


def compiled_steps() -> Any:
    """Trained weights before frozen ones of 4 and 8 bits, in one graph."""
    layers = [bnbops.nn.LinearNF4(64, 64, False, **_FP32), bnbops.nn.Linear8bitLt(64, 64, False, **_INT8)]
    weight, x = nn.Parameter(normal(64, 64)), normal(3, 64, seed=1)
    for layer in layers:
        layer.load_state_dict({"weight": normal(64, 64, seed=2)})
        layer.to("cpu")
    optimizer = bnbops.optim.AdamW8bit([weight], lr=1e-2)

    @bnbops.compiled_train_step(optimizer=optimizer, backend="aot_eager")
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.zeros(3)
        loss = layers[1](layers[0](x @ weight)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss, made

    (first, made), (second, _) = step(x), step(x)
    assert step.graph_count == 1
    assert made.dtype == torch.get_default_dtype() and made.device == torch.get_default_device()  # it is the user's
    return first, second, weight, optimizer.state_dict()


@pytest.mark.every_torch
def test_compiled_steps_do_not_depend_on_settings():
    wanted = bits(compiled_steps())
    for setting in ("default dtype float64", "default device"):
        with SETTINGS[setting]():
            found = compiled_steps()
        assert bits(found) == wanted, setting


def test_self_check_under_all_settings_at_once():
    with contextlib.ExitStack() as stack:
        for setting in SETTINGS.values():
            stack.enter_context(setting())
        assert [problems for _, _, problems in self_check.run() if problems] == []


def test_imported_under_other_settings():
    """As a library that imports it in the middle of a program does. Constants do not end up in a mode."""
    program = """
import torch
torch.set_default_dtype(torch.float64)
torch.use_deterministic_algorithms(True)
with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu"):
    import bnbops
absmax = torch.ones(1, dtype=torch.float32, requires_grad=True)
codes = torch.arange(256, dtype=torch.uint8)
bnbops.functional.dequantize_blockwise(codes, absmax=absmax).sum().backward()
torch.testing.assert_close(absmax.grad, bnbops.functional.create_dynamic_map().sum().view(1))
"""
    ended = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr


# ---- what the settings are for ---------------------------------------------------------------------------------


MAKES: dict[str, Callable[..., nn.Module]] = {
    "LinearNF4": lambda **given: bnbops.nn.LinearNF4(64, 32, **given),
    "Linear8bitLt": lambda **given: bnbops.nn.Linear8bitLt(64, 32, has_fp16_weights=False, **given),
    "Embedding4bit": lambda **given: bnbops.nn.Embedding4bit(32, 64, **given),
    "Embedding8bit": lambda **given: bnbops.nn.Embedding8bit(32, 64, **given),
    "StableEmbedding": lambda **given: bnbops.nn.StableEmbedding(32, 64, **given),
}


@pytest.mark.parametrize("name", MAKES)
def test_layers_are_made_as_the_settings_say(name):
    """As torch's own."""
    with SETTINGS["default device"](), SETTINGS["default dtype bfloat16"]():
        made, given = MAKES[name](), MAKES[name](device="cpu")
    assert {(p.device.type, p.dtype) for p in made.parameters() if p.dim() == 2} == {("meta", torch.bfloat16)}
    assert {(p.device.type, p.dtype) for p in given.parameters() if p.dim() == 2} == {("cpu", torch.bfloat16)}
    with torch.device("meta"):
        assert all(p.is_meta for p in MAKES[name]().parameters())
    for parameter in (bnbops.nn.Params4bit, bnbops.nn.Int8Params):
        with torch.device("meta"):
            assert parameter().device == nn.Parameter().device

"""torch's averages of weights, and those that people write by hand, over quantized models with adapters."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel

from bnbops.nn import Linear4bit
from bnbops.nn.parametrize import replace_parameter_4bit
from cases.layers_4bit import raw
from cases.quantize_model import quantize_
from cases.quantized import EMBEDDINGS, IN, LINEARS, OUT, TOKENS, features, quantized

UPDATES, DECAY = 20, 0.9999  # at which torch's average of two equal bytes is one less for 46 of the 256


class Adapted(nn.Module):
    """A frozen layer, a trained one beside it, and a buffer."""

    def __init__(self, base: nn.Module, tokens: bool) -> None:
        super().__init__()
        self.base, self.tokens = base.requires_grad_(False), tokens
        if getattr(base, "bias", None) is not None:
            nn.init.zeros_(base.bias)  # of which any average is exact
        self.beside = nn.Embedding(TOKENS, IN) if tokens else nn.Linear(IN, OUT)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.beside(x)


class Stack(nn.Module):
    """Experts of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, OUT, IN))
        replace_parameter_4bit(self, "up", compress_statistics=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up[0].t() + x @ self.up[1].t()


FROZEN = {name: make for name, make in LINEARS.items() if not name.startswith("experts")} | {"stack": Stack}
del FROZEN["int8 of a float weight"]  # it is trained, and averaged as any
CASES: dict[str, Callable[[], Adapted]] = {
    **{name: (lambda make=make: Adapted(quantized(make), False)) for name, make in FROZEN.items()},
    **{
        f"embedding, {name}": (lambda make=make: Adapted(quantized(make, torch.float32), True))
        for name, make in EMBEDDINGS.items()
    },
}
cases = pytest.mark.parametrize("case", CASES)


def _change(model: Adapted, step: int) -> None:
    """As a training step would."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.beside.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        model.seen.fill_(step)


def _trained(model: Adapted) -> list[Tensor]:
    return [p.detach().clone().double() for p in model.beside.parameters()]


def _quantized(model: Adapted) -> dict[str, Tensor]:
    """The bytes of codes and scales, as the state dict and as the module has them."""
    held = {f"held {name}": t for name, t in (*model.base.named_parameters(), *model.base.named_buffers())}
    tensors = {**model.base.state_dict(), **held}
    return {name: raw(t).clone() for name, t in tensors.items() if not name.endswith("bias")}


def _assert_frozen(averaged: Adapted, model: Adapted, bytes_: dict[str, Tensor]) -> None:
    found = _quantized(averaged)
    assert found.keys() == bytes_.keys() and [n for n, t in found.items() if not torch.equal(t, bytes_[n])] == []
    x = torch.tensor([0, 5, TOKENS - 1]) if model.tokens else features(3)
    assert torch.equal(averaged.base(x), model.base(x))


EMA = {
    "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)},
    "ema of single tensors": {"avg_fn": swa_utils.get_ema_avg_fn(DECAY)},
    "ema of buffers, too": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY), "use_buffers": True},
}
SWA = {
    "swa": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "swa of single tensors": {"avg_fn": swa_utils.get_swa_avg_fn()},
    "swa by default": {},
    "swa of buffers, too": {"use_buffers": True},
}


@pytest.mark.parametrize("way", EMA | SWA)
@cases
def test_torchs_averages(case, way):
    """Quantized tensors are the model's, to the bit; adapters are averaged, and buffers are averaged or copied."""
    torch.manual_seed(0)
    model = CASES[case]()
    before = _quantized(model)
    averaged = AveragedModel(model, **(EMA | SWA)[way])
    expected, seen = _trained(model), []
    for step in range(UPDATES):
        _change(model, step)
        averaged.update_parameters(model)
        seen.append(float(step))
        share = 1 / (step + 1) if way in SWA else 1.0 if step == 0 else 1 - DECAY
        expected = [a + share * (b - a) for a, b in zip(expected, _trained(model), strict=True)]
    _assert_frozen(averaged.module, model, before)
    _assert_frozen(model, model, before)
    for found, wanted in zip(_trained(averaged.module), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert averaged.n_averaged == UPDATES and averaged.avg_fn is (EMA | SWA)[way].get("avg_fn")
    if "buffers" not in way:
        assert averaged.module.seen.tolist() == [seen[-1]] * 3
    elif way in SWA:
        assert averaged.module.seen[0].item() == pytest.approx(sum(seen) / UPDATES, rel=1e-4)
    else:
        assert 0 < averaged.module.seen[0].item() < 1


def test_a_weight_that_is_loaded_anew_is_copied():
    """The average of frozen tensors is what the model has."""
    model, other = (
        Adapted(quantized(LINEARS["nf4"]), False),
        Linear4bit(IN, OUT, quant_type="nf4", compress_statistics=False),
    )
    averaged = AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY))
    averaged.update_parameters(model)
    model.base.load_state_dict(other.to("cpu").state_dict())
    averaged.update_parameters(model)
    assert torch.equal(raw(averaged.module.base.weight), raw(model.base.weight))
    assert torch.equal(averaged.module.base.weight_absmax, model.base.weight_absmax)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_model_that_is_quantized_after_its_average_was_made(format):
    """Refused, with nothing changed: the average would have to be of codes and floats."""
    model = nn.Sequential(nn.Linear(IN, IN), nn.ReLU(), nn.Linear(IN, 8))
    averaged = AveragedModel(model)
    before = copy.deepcopy(averaged.state_dict())
    quantize_(model, format)
    with pytest.raises(RuntimeError, match=r"0\.weight is u?int8 .* not quantized in its average.*quantize the model"):
        averaged.update_parameters(model)
    assert all(torch.equal(x, before[key]) for key, x in averaged.state_dict().items())


def test_wrapped_models():
    """By order, as torch pairs parameters: a compiled or wrapped model's names differ."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = CASES["nf4 nested"]()
    before, averaged = _quantized(model), AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY))
    for step in range(3):
        _change(model, step)
        averaged.update_parameters(Wrapper(model))
    _assert_frozen(averaged.module, model, before)


def test_models_without_quantized_tensors():
    """torch's own results; layers that are not quantized yet are float ones."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(IN, IN), nn.BatchNorm1d(IN), Linear4bit(IN, 8))
    averaged, expected = AveragedModel(plain, use_buffers=True), copy.deepcopy(plain)
    for step in range(4):
        plain[:2](torch.randn(5, IN))
        with torch.no_grad():
            for p in plain.parameters():
                p.add_(0.1 * step)
        averaged.update_parameters(plain)
        for a, b in zip(
            (*expected.parameters(), *expected.buffers()), (*plain.parameters(), *plain.buffers()), strict=True
        ):
            a.data.copy_(b if step == 0 else a + (b - a) / (step + 1))
    for a, b in zip(averaged.module.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


# ---- by hand -----------------------------------------------------------------------------------------------------


def _only_floats(average: Adapted, model: Adapted) -> None:
    """As timm, Diffusers and others have it."""
    for a, b in zip(average.parameters(), model.parameters(), strict=True):
        if b.is_floating_point() and b.requires_grad:
            a.data.lerp_(b.data, 1 - DECAY)
        else:
            a.data.copy_(b.data)


def _state_dict(average: Adapted, model: Adapted) -> None:
    current = model.state_dict()
    for key, a in average.state_dict().items():
        a.lerp_(current[key], 1 - DECAY) if a.is_floating_point() else a.copy_(current[key])


RIGHT: dict[str, Callable[[Adapted, Adapted], None]] = {"floats only": _only_floats, "state dict": _state_dict}


@pytest.mark.parametrize("way", RIGHT)
@cases
def test_averages_by_hand(case, way):
    """Those that leave integers alone come out right, also over a state dict, where scales are floats."""
    if way == "state dict" and case == "bytes in bfloat16":
        return  # these codes look like floats in a state dict
    model = CASES[case]()
    before, average = _quantized(model), copy.deepcopy(model)
    expected = _trained(model)
    for step in range(10):
        _change(model, step)
        RIGHT[way](average, model)
        expected = [a + (1 - DECAY) * (b - a) for a, b in zip(expected, _trained(model), strict=True)]
    average.load_state_dict(average.state_dict())
    _assert_frozen(average, model, before)
    for found, wanted in zip(_trained(average), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def _pairs(average: Adapted, model: Adapted) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
    return zip(average.base.parameters(), model.base.parameters(), strict=True)


def _multiply(average: Adapted, model: Adapted) -> None:
    for a, b in _pairs(average, model):
        a.mul_(DECAY).add_(b, alpha=1 - DECAY)


def _lerp(average: Adapted, model: Adapted) -> None:
    for a, b in _pairs(average, model):
        a.lerp_(b, 1 - DECAY)


def _copy(average: Adapted, model: Adapted) -> None:
    for a, b in _pairs(average, model):
        a.copy_(DECAY * a + (1 - DECAY) * b)


def _assign(average: Adapted, model: Adapted) -> None:
    for a, b in _pairs(average, model):
        a.data = DECAY * a.data + (1 - DECAY) * b.data
    average(features(3))


WRONG: dict[str, Any] = {
    "multiply": (_multiply, "can't be cast|codes"),
    "lerp": (_lerp, "not implemented for|codes"),
    "copy": (_copy, "codes"),
    "assign": (_assign, "has been cast|is not quantized|codes"),
}


@torch.no_grad()
@pytest.mark.parametrize("way", WRONG)
@pytest.mark.parametrize("case", ["nf4", "nf4 nested", "int8"])
def test_averages_of_integers_are_refused(case, way):
    """Not truncated to other codes."""
    model = CASES[case]()
    call, message = WRONG[way]
    with pytest.raises(RuntimeError, match=message):
        call(copy.deepcopy(model), model)

"""Quantized, loaded or stepped in inference mode, and used afterwards: torch trains with nothing made in it."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bnbops
from cases.global_settings import bits
from cases.optimizer_classes import build
from cases.optimizers import params as make_params
from cases.optimizers import set_grads

pytestmark = pytest.mark.every_torch


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def in_inference_mode(how: str, quant: str) -> nn.Module:
    """A quantized layer."""
    float_layer = nn.Sequential(nn.Linear(64, 64))
    state = bnbops.nn.quantize_(copy.deepcopy(float_layer), quant, progress=False).state_dict()
    fresh = {
        "nf4": lambda: bnbops.nn.LinearNF4(64, 64),
        "int8": lambda: bnbops.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    }
    with torch.inference_mode(mode=how == "made there"):
        layer = nn.Sequential(fresh[quant]())
    if how == "made there":
        layer.to("cpu")
        return layer
    with torch.inference_mode():
        if how == "moved":
            return layer.to("cpu")
        if how == "loaded":
            layer.load_state_dict(state)
            return layer
        if how == "quantize_":
            return bnbops.nn.quantize_(float_layer, quant, progress=False)
        model = copy.deepcopy(float_layer).to("meta")
        return bnbops.nn.quantize_(model, quant, state=float_layer.state_dict(), progress=False)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("how", ["moved", "loaded", "quantize_", "quantize_, state="])
def test_quantized_in_inference_mode_and_trained_afterwards(how, quant):
    model = in_inference_mode(how, quant)
    assert [name for name, tensor in all_tensors(model).items() if tensor.is_inference()] == []
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    if quant == "nf4":
        state = model[0].weight.quant_state
        bnbops.matmul_4bit(x, model[0].weight, state).sum().backward()


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_made_in_inference_mode_and_quantized_afterwards(quant):
    """torch keeps such a layer from training, but not from being saved."""
    model = in_inference_mode("made there", quant)
    assert bits(copy.deepcopy(model).state_dict()) == bits(model.state_dict())


@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB", "PytorchLARS", "PagedLion8bit"])
def test_stepped_and_loaded_in_inference_mode_and_trained_afterwards(name):
    expected_params, params = make_params((64, 80), (80,)), make_params((64, 80), (80,))
    wanted, mine = (
        build(name, expected_params, lr=1e-2),
        build(name, params, lr=torch.tensor(1e-2, dtype=torch.float64)),
    )
    for step in range(3):
        for each, optimizer in ((expected_params, wanted), (params, mine)):
            set_grads(each, step)
            with torch.inference_mode(mode=step == 0 and optimizer is mine):
                optimizer.step()
        if step == 1:
            state = copy.deepcopy(mine.state_dict())
            with torch.inference_mode():
                mine.load_state_dict(state)
    torch.optim.lr_scheduler.StepLR(mine, 1).step()  # writes to the learning rate
    tensors = [mine.param_groups[0]["lr"], *(x for state in mine.state.values() for x in state.values())]
    assert not any(x.is_inference() for x in tensors)
    assert bits(params) == bits(expected_params)

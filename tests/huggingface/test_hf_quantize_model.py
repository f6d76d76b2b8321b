"""bnbops.nn.quantize_ on models of Transformers: `Conv1D`, a linear layer whose weight is transposed, and resizing."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import bnbops
from bnbops.integrations.transformers import BnbOpsConfig
from bnbops.nn import Linear4bit, quantization_plan
from cases.hf import tiny_gpt2, token_batch
from cases.quantize_model import FORMATS, by_hand, quantize_


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = Conv1D(96, 64), Conv1D(64, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(x).relu())


@pytest.mark.parametrize("quant", FORMATS)
def test_a_conv1d_is_a_linear_layer(quant: str) -> None:
    torch.manual_seed(0)
    model = Projections()
    nn.init.normal_(model.wide.bias)
    expected = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    for linear, conv in ((expected[0], model.wide), (expected[2], model.narrow)):
        linear.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})
    expected[0], expected[2] = by_hand(expected[0], quant), by_hand(expected[2], quant)
    x = torch.randn(3, 64)
    assert torch.equal(quantize_(model, quant)(x), expected(x))


def test_the_weights_of_gpt2_come_from_a_file(tmp_path) -> None:
    model, x = tiny_gpt2(), token_batch()
    state = model.state_dict()
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with torch.device("meta"):
        again = GPT2LMHeadModel(model.config).eval()
    again.tie_weights()
    quantize_(again, state=tmp_path / "model.safetensors")
    quantize_(model)
    assert type(again.transformer.h[0].attn.c_attn) is Linear4bit
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


def test_subclasses_of_conv1d_are_left() -> None:
    class Other(Conv1D):
        pass

    model = Projections()
    model.wide = Other(96, 64)
    assert quantization_plan(model).leave == {"wide": "it is a Other, not a plain Conv1D"}
    assert bnbops.nn.quantization_plan(model).convert == {"narrow": "Linear4bit"}


@pytest.mark.parametrize("how", ["as it is", "copied", "pickled"])
@pytest.mark.parametrize("by", ["quantize_", "from_pretrained"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_quantized_embeddings_cannot_be_resized(quant: str, by: str, how: str, tmp_path) -> None:
    if by == "quantize_":
        model = quantize_(tiny_gpt2(), quant, embeddings=True, skip=[])
    else:
        tiny_gpt2().save_pretrained(tmp_path)
        config = BnbOpsConfig(quant, embeddings=True, skip=[])
        model = GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=config)
    model = {"as it is": lambda m: m, "copied": copy.deepcopy, "pickled": _pickled}[how](model)
    rows = model.config.vocab_size
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for sizes in ((rows + 1,), (rows - 1,), (rows + 1, 64)):
        with pytest.raises(
            RuntimeError, match=rf"wte is quantized \(Embedding.bit.* has {rows} rows, .*resize the float"
        ):
            model.resize_token_embeddings(*sizes)
    assert model.config.vocab_size == rows
    assert model.resize_token_embeddings() is model.resize_token_embeddings(rows) is model.get_input_embeddings()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_float_embeddings_can_be_resized(quant: str) -> None:
    model = quantize_(tiny_gpt2(), quant)
    rows, x = model.config.vocab_size, token_batch()
    with torch.no_grad():
        before = model(x).logits
        model.resize_token_embeddings(rows + 4, mean_resizing=False)
        assert torch.equal(model(x).logits[..., :rows], before)

"""PEFT's adapters around quantized layers of torch's encoders, whose fused kernels would leave the adapters out."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bnbops.nn import Linear8bitLt, LinearNF4
from cases.hf import randomize

pytestmark = pytest.mark.usefixtures("registered_with_peft")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [LinearNF4, Linear8bitLt])
def test_adapters_count(kind: type[nn.Linear], masked: bool) -> None:
    torch.manual_seed(0)
    options = {"has_fp16_weights": False} if kind is Linear8bitLt else {}
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
    layer.linear1, layer.linear2 = kind(64, 128, **options).to("cpu"), kind(128, 64, **options).to("cpu")
    encoder = nn.TransformerEncoder(layer, 2).eval()
    model = get_peft_model(encoder, LoraConfig(r=4, target_modules=["linear1", "linear2"])).eval()
    randomize(model)
    x, mask = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    mask = mask if masked else None

    with torch.enable_grad():  # never fused
        expected = model(x, src_key_padding_mask=mask).detach()
        with model.disable_adapter():
            assert not torch.allclose(model(x, src_key_padding_mask=mask), expected, atol=0.01)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = model(x, src_key_padding_mask=mask)
            kept = slice(None) if mask is None else ~mask
            torch.testing.assert_close(found[kept], expected[kept])

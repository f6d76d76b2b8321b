"""Loading, adapting and merging models gives the same under any of torch's global settings but a default device, which
Transformers itself loads onto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bnbops.integrations.transformers import BnbOpsConfig
from bnbops.testing.sample import normal
from cases.global_settings import SETTINGS, bits
from cases.hf import saved, tiny_mixtral, token_batch

CONFIGS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: BnbOpsConfig("nf4"),
    "int8": lambda: BnbOpsConfig("int8"),
    "bitsandbytes": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
}


def adapted(model: nn.Module) -> nn.Module:
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")).float()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.05 * normal(*parameter.shape, seed=i))
    return model


def loaded_and_merged(name: str, folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CONFIGS[name](), dtype=torch.float32, device_map="cpu"
    )
    results = [model.state_dict()]
    model = adapted(model)
    with torch.autocast("cpu", enabled=False):  # which is there to change the dtype of products
        results += [model(token_batch()).logits, model.merge_and_unload().state_dict()]
    return results


@pytest.mark.parametrize("name", CONFIGS)
def test_models_do_not_depend_on_settings(name, tmp_path, request):
    request.getfixturevalue("as_bitsandbytes" if name == "bitsandbytes" else "registered_with_peft")
    folder = saved(tiny_mixtral(), tmp_path / "model")
    wanted = bits(loaded_and_merged(name, folder))
    for setting, enter in SETTINGS.items():
        if "device" not in setting:
            with enter():
                found = loaded_and_merged(name, folder)
            assert bits(found) == wanted, setting

"""TRL's SFTTrainer fine-tunes quantized models: with the alias and nothing changed, and without it."""

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import bnbops
import bnbops.integrations.peft as integration
from bnbops.integrations.transformers import BnbOpsConfig
from cases.hf import saved, tiny_llama, tiny_tokenizer, token_batch

TEXTS = ["The quick brown fox.", "A lazy dog sleeps.", "It rains today.", "Snow in May."]


def fine_tune(model: nn.Module, folder: Path, optim: str, **others: object) -> SFTTrainer:
    """A few steps; the loss falls."""
    options = {"max_steps": 6, "logging_steps": 1, "per_device_train_batch_size": 4, "max_length": 32}
    options |= {"learning_rate": 2e-2, "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False}
    options |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "optim": optim}
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(folder), **options),
        train_dataset=Dataset.from_dict({"text": TEXTS * 2}),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        **others,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3, losses
    return trainer


def frozen(model: nn.Module) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    return {name.removeprefix("base_model.model.").replace(".base_layer", ""): value for name, value in state.items()}


def equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_batch()).logits


def assert_saved(trainer: SFTTrainer, fresh: nn.Module, folder: Path) -> None:
    """The adapter loads onto a fresh model, and merges."""
    trainer.save_model(folder)
    loaded = PeftModel.from_pretrained(fresh, folder)
    adapters = get_peft_model_state_dict(trainer.model)  # in bf16: TRL casts them if a model says that it is quantized
    assert equal(get_peft_model_state_dict(loaded), {name: value.float() for name, value in adapters.items()})
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    out = logits(loaded)
    assert torch.equal(logits(trainer.model), out)
    merged = logits(loaded.merge_and_unload())
    assert (merged - out).norm() < 0.3 * out.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_with_the_alias(bits: int, as_bitsandbytes: object, tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path / "model")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options = options if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, dtype=torch.float32)

    model = load()
    before = frozen(model)
    trainer = fine_tune(model, tmp_path / "out", "paged_adamw_8bit")
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is bnbops.optim.AdamW
    assert all(group["is_paged"] and group["optim_bits"] == 8 for group in optimizer.param_groups)
    assert equal(frozen(trainer.model), before)
    assert_saved(trainer, load(), tmp_path / "adapter")


@pytest.mark.parametrize("way", ["quantize_", "from_pretrained"])
def test_without_the_alias(way: str, registered_with_peft: None, tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path / "model")

    def load() -> nn.Module:
        if way == "quantize_":
            return bnbops.nn.quantize_(AutoModelForCausalLM.from_pretrained(folder), progress=False)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BnbOpsConfig("nf4"), dtype=torch.float32
        )

    model = load()
    before = frozen(model)
    optimizer = bnbops.optim.PagedAdamW8bit, {"lr": 2e-2}
    trainer = fine_tune(model, tmp_path / "out", "adamw_torch", optimizer_cls_and_kwargs=optimizer)
    assert type(trainer.optimizer.optimizer) is bnbops.optim.PagedAdamW8bit
    assert any(isinstance(module, integration.LoraLinear) for module in trainer.model.modules())
    assert equal(frozen(trainer.model), before)
    assert_saved(trainer, load(), tmp_path / "adapter")
    assert "bitsandbytes" not in sys.modules

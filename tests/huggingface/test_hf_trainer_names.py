"""The optimizers that Trainer takes from bitsandbytes: `TrainingArguments(optim="adamw_8bit")` and so on."""

import gc
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS

import bnbops
from cases.hf import saved, tiny_gpt2, tiny_llama, token_batch
from cases.hf_reference import config
from cases.paged import is_paged

pytestmark = pytest.mark.usefixtures("as_bitsandbytes")

# name: class, bits of the states, whether they are paged, and how many states a parameter has
NAMES = {
    "adamw_bnb_8bit": ("AdamW", 8, False, 2),
    "adamw_8bit": ("AdamW", 8, False, 2),
    "paged_adamw_32bit": ("AdamW", 32, True, 2),
    "paged_adamw_8bit": ("AdamW", 8, True, 2),
    "ademamix": ("AdEMAMix", 32, False, 3),
    "ademamix_8bit": ("AdEMAMix", 8, False, 3),
    "paged_ademamix_32bit": ("AdEMAMix", 32, True, 3),
    "paged_ademamix_8bit": ("AdEMAMix", 8, True, 3),
    "lion_32bit": ("Lion", 32, False, 1),
    "lion_8bit": ("Lion", 8, False, 1),
    "paged_lion_32bit": ("Lion", 32, True, 1),
    "paged_lion_8bit": ("Lion", 8, True, 1),
    "rmsprop_bnb": ("RMSprop", 32, False, 1),
    "rmsprop_bnb_8bit": ("RMSprop", 8, False, 1),
    "rmsprop_bnb_32bit": ("RMSprop", 32, False, 1),
}


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """Trainer collects garbage: looking at all that is imported takes longer than to train a tiny model."""
    gc.freeze()
    yield
    gc.unfreeze()


def trained(model: nn.Module, folder: Path, checkpoint: Path | None = None, **options: object) -> Trainer:
    """After four steps, the first two of them the checkpoint's if there is one; `folder` has one after two steps."""
    rows = [{"input_ids": row, "labels": row} for row in token_batch(rows=16)]
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    quiet = {"logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 1}
    batch = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "output_dir": str(folder)}
    arguments = TrainingArguments(**steps | quiet | batch | options)
    trainer = Trainer(model=model.train(), args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def optimizer(trainer: Trainer) -> bnbops.optim.Optimizer:
    return trainer.optimizer.optimizer  # accelerate's has it


def states(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    """By the parameter's name."""
    held = optimizer(trainer).state
    return {name: held[parameter] for name, parameter in trainer.model.named_parameters()}


def assert_same(first: Trainer, second: Trainer) -> None:
    """Weights and states, bit for bit."""
    weights, others = first.model.state_dict(), second.model.state_dict()
    assert weights.keys() == others.keys() and all(map(torch.equal, weights.values(), others.values()))
    for name, state in states(first).items():
        other = states(second)[name]
        assert state.keys() == other.keys() and state["step"] == 4
        assert all(map(torch.equal, state.values(), other.values())), name


def test_all_names_are_here():
    assert {name.value for name in _BITSANDBYTES_OPTIMIZERS} == NAMES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_training_and_resuming(tmp_path, monkeypatch, name):
    """States as the name says, and 32 bits for embeddings; a run that was resumed ends as one that was not."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    family, bits, paged, count = NAMES[name]
    model = tiny_llama(num_hidden_layers=1)
    full = trained(model, tmp_path / "full", optim=name)
    assert type(optimizer(full)) is getattr(bnbops.optim, family)
    initial = tiny_llama(num_hidden_layers=1).state_dict()
    assert not any(torch.equal(tensor, initial[key]) for key, tensor in full.model.state_dict().items())

    embedding, large = "model.embed_tokens.weight", 4096
    for key, state in states(full).items():
        values = [tensor for part, tensor in state.items() if part != "step" and not part.endswith("_absmax")]
        small = key == embedding or model.get_parameter(key).numel() < large
        dtype = torch.uint8 if bits == 8 and not small else torch.float32
        assert [value.dtype for value in values] == [dtype] * count, key
        assert all(is_paged(value, tmp_path) == paged for value in values), key
    assert model.get_parameter(embedding).numel() >= large  # or it would have 32 bits anyway

    resumed = trained(tiny_llama(1, num_hidden_layers=1), tmp_path / "rest", tmp_path / "full/checkpoint-2", optim=name)
    assert_same(full, resumed)


def test_tied_embeddings_and_dropout(tmp_path):
    """GPT-2: the head is the embedding's parameter, with one state; the masks after a restart are those without one."""
    options = {"optim": "adamw_8bit"}
    full = trained(tiny_gpt2(n_layer=1), tmp_path / "full", **options)
    assert full.model.lm_head.weight is full.model.transformer.wte.weight and full.model.config.resid_pdrop > 0
    dtypes = {name: state["exp_avg"].dtype for name, state in states(full).items()}
    assert dtypes["transformer.wte.weight"] == dtypes["transformer.wpe.weight"] == torch.float32
    assert dtypes["transformer.h.0.attn.c_attn.weight"] == torch.uint8
    resumed = trained(tiny_gpt2(1, n_layer=1), tmp_path / "rest", tmp_path / "full/checkpoint-2", **options)
    assert_same(full, resumed)


def test_gradient_accumulation_and_clipping(tmp_path):
    """A norm that every step exceeds: the weights move otherwise than without it, and resume as well."""
    options = {
        "optim": "paged_adamw_8bit",
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1e-9,
        "adam_epsilon": 1e-6,
    }
    full = trained(tiny_llama(num_hidden_layers=1), tmp_path / "full", **options)
    resumed = trained(tiny_llama(1, num_hidden_layers=1), tmp_path / "rest", tmp_path / "full/checkpoint-2", **options)
    assert_same(full, resumed)
    moved = (full.model.model.norm.weight - 1).abs().max()
    assert 0 < moved < 1e-4  # 4 steps of at most 1e-2 * 1e-9 / 1e-6


def test_quantized_model_is_not_trained_without_adapters(tmp_path):
    """Trainer says so itself."""
    model = AutoModelForCausalLM.from_pretrained(saved(tiny_llama(), tmp_path), quantization_config=config("nf4"))
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trained(model, tmp_path / "full", optim="adamw_8bit")

"""bnbops' optimizers in Transformers' Trainer, by class: `optimizer_cls_and_kwargs=(bnbops.optim.AdamW8bit, {...})`."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, get_cosine_schedule_with_warmup

import bnbops
from bnbops.integrations.transformers import keep_embeddings_in_32_bits
from cases.hf import tiny_gpt2, tiny_llama, token_batch
from cases.hf_trainer import TinyLM, assert_same_run, examples, logged, optimizer_of, state_dtypes, trainer_of
from cases.optimizer_classes import FAMILIES, WITH_8BIT, build

STEPS, ROWS = 4, 2  # of a micro-batch; two make a step
ALL_OPTIONS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": ROWS,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
}
MANAGER = bnbops.optim.GlobalOptimManager
# Each family; the precisions and paging of all are one class's.
NAMES = [*(f"{name}8bit" for name in WITH_8BIT), *(set(FAMILIES) - set(WITH_8BIT)), "AdamW32bit", "PagedAdamW8bit"]


def _loop(model: nn.Module, name: str, batches: torch.Tensor) -> list[torch.Tensor]:
    """What ALL_OPTIONS ask for, by hand. Returns the gradients' norms."""
    decayed = [p for n, p in model.named_parameters() if "norm" not in n and "bias" not in n]
    rest = [p for n, p in model.named_parameters() if "norm" in n or "bias" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = build(name, groups, lr=1e-3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 1, STEPS)
    norms = []
    model.train()
    for micro_batches in batches.unflatten(0, (STEPS, 2)):
        for tokens in micro_batches:
            model(tokens, tokens, num_items_in_batch=torch.tensor(float(micro_batches.numel())))["loss"].backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        scheduler.step()
        model.zero_grad()
    return norms


@pytest.mark.parametrize("name", NAMES)
def test_trainer_takes_the_steps_of_a_loop_by_hand(name: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if "8bit" in name else torch.float32
    tokens = token_batch(STEPS * 2 * ROWS, 8)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    ours, theirs = TinyLM().to(dtype), TinyLM().to(dtype)

    usual = build(name, [nn.Parameter(torch.ones(1))], lr=1e-3).defaults
    options = {"lr": 1e-3} | {key: usual[key] for key in ("momentum",) if key in usual}
    extra = {"data_collator": lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]}}
    trainer = trainer_of(ours, tmp_path, data, InOrder, (getattr(bnbops.optim, name), options), extra, **ALL_OPTIONS)
    trainer.train()

    norms = _loop(theirs, name, tokens.unflatten(0, (-1, ROWS)))
    assert [norm for _, norm, _ in logged(trainer)] == [norm.item() for norm in norms]
    for (key, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(left, right), key
    assert not torch.equal(ours.head.weight, TinyLM().to(dtype).head.weight)


@pytest.mark.parametrize("fused", [False, True])
def test_float16_with_clipping(fused: bool, tmp_path: Path) -> None:
    """An overflow in the first of four steps. Clipping, the scale and the schedule go on as with torch's optimizer,
    unless the operator skips the step: Accelerate counts it then."""
    runs = []
    for cls in (bnbops.optim.AdamW, torch.optim.AdamW):
        trainer = trainer_of(
            TinyLM(), tmp_path, examples(16), optimizer=(cls, {"lr": 1e-2}), fp16=True, max_grad_norm=0.5
        )
        # Accelerate has no float16 on the CPU: it gets the scaler that it would have on a GPU.
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", 2.0**30, backoff_factor=2.0**-20)
        trainer.create_optimizer().fused_scaling = fused
        trainer.train()
        assert trainer.accelerator.scaler.get_scale() == 2.0**10
        assert {float(state["step"]) for state in optimizer_of(trainer).state.values()} == {3.0}
        runs.append(trainer)
    if not fused:
        assert [rate for *_, rate in logged(runs[0])] == [rate for *_, rate in logged(runs[1])]
        for ours, theirs in zip(*(run.model.parameters() for run in runs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class InOrder(Trainer):
    """Without shuffling."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "AdEMAMix8bit", "LAMB"])
def test_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    def make() -> Trainer:
        model = TinyLM(dropout=0.1)
        keep_embeddings_in_32_bits(model)
        optimizer = getattr(bnbops.optim, name), {"lr": 1e-2}
        return trainer_of(model, tmp_path, examples(12), optimizer=optimizer, **options)

    options = {**ALL_OPTIONS, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_run(resumed, whole)
    assert logged(resumed) == logged(whole)


# --------------------------------------------------------------------------------------------------------- embeddings


def test_states_of_embeddings_have_32_bits_also_after_resuming(tmp_path: Path) -> None:
    def make() -> Trainer:
        model = tiny_llama()
        assert keep_embeddings_in_32_bits(model) == ["model.embed_tokens"]
        return trainer_of(model, tmp_path, examples(8), save_strategy="steps", save_steps=2)

    first, resumed = make(), make()
    first.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for trainer in (first, resumed):
        dtypes = state_dtypes(trainer)
        assert dtypes["model.embed_tokens.weight"] == torch.float32
        assert dtypes["lm_head.weight"] == dtypes["model.layers.0.self_attn.q_proj.weight"] == torch.uint8


def test_without_it_they_have_8(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_llama(), tmp_path, examples(8), max_steps=1)
    trainer.train()
    assert state_dtypes(trainer)["model.embed_tokens.weight"] == torch.uint8


def test_a_tied_head_follows_its_embedding(tmp_path: Path) -> None:
    model = tiny_gpt2()
    assert keep_embeddings_in_32_bits(model) == ["transformer.wte", "transformer.wpe"]
    optimizer = bnbops.optim.AdamW8bit(model.parameters())
    optimizer.init_state()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert optimizer.state[model.lm_head.weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model.transformer.h[0].mlp.c_fc.weight]["exp_avg"].dtype == torch.uint8


def test_what_is_overridden_stays_and_a_late_call_warns() -> None:
    mine, theirs, ours = nn.Embedding(96, 64), nn.Embedding(96, 64), bnbops.nn.Embedding(96, 64)
    model = nn.ModuleDict({"mine": mine, "theirs": theirs, "ours": ours})
    MANAGER.get_instance().override_config(mine.weight, "optim_bits", 8)
    MANAGER.get_instance().override_config(theirs.weight, "lr", 0.1)
    assert keep_embeddings_in_32_bits(model) == ["theirs"]
    assert keep_embeddings_in_32_bits(model) == []
    assert MANAGER.get_instance().overrides_for(theirs.weight) == {"lr": 0.1, "optim_bits": 32}

    late = nn.Embedding(96, 64)
    optimizer = bnbops.optim.AdamW8bit(late.parameters())
    optimizer.init_state()
    with pytest.warns(UserWarning, match="too late"):
        keep_embeddings_in_32_bits(late)

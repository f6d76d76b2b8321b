"""What the tests of Transformers' Trainer share: a model that compiles fast, its data, and a run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import bnbops
from cases.hf import VOCABULARY, token_batch

ADAMW = (bnbops.optim.AdamW8bit, {"lr": 1e-2})


class TinyLM(nn.Module):
    """An embedding, a dropout, a layer and a head; it sums losses over `num_items_in_batch`, as Transformers' do."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 64)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.dropout(self.embedding(input_ids))))
        if labels is None:
            return {"logits": logits}
        items = options.get("num_items_in_batch")
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        return {"loss": loss / (labels.numel() if items is None else items), "logits": logits}


def examples(count: int, columns: int = 8, seed: int = 1) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in token_batch(count, columns, seed)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Four steps of four rows on the CPU, each logged."""
    usual = {"per_device_train_batch_size": 4, "max_steps": 4, "use_cpu": True, "seed": 0}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    return TrainingArguments(str(folder), **usual | quiet | options)


def trainer_of(
    model: nn.Module,
    folder: Path,
    data: list[dict[str, Tensor]],
    cls: type[Trainer] = Trainer,
    optimizer: tuple[type, dict[str, Any]] = ADAMW,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """`extra` goes to the Trainer, all other options to its TrainingArguments."""
    args = arguments(folder, **options)
    return cls(model, args, train_dataset=data, optimizer_cls_and_kwargs=optimizer, **extra or {})


def logged(trainer: Trainer) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of every step."""
    keys = ("loss", "grad_norm", "learning_rate")
    return [tuple(entry[key] for key in keys) for entry in trainer.state.log_history if "loss" in entry]


def optimizer_of(trainer: Trainer) -> torch.optim.Optimizer:
    """The optimizer, out of Accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def assert_same_run(left: Trainer, right: Trainer) -> None:
    """Weights and optimizer states of two trainers, bit for bit."""
    for (name, ours), theirs in zip(left.model.named_parameters(), right.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        states = optimizer_of(left).state[ours], optimizer_of(right).state[theirs]
        assert states[0].keys() == states[1].keys(), name
        for key, value in states[0].items():
            assert torch.equal(value, states[1][key]), (name, key)


def state_dtypes(trainer: Trainer) -> dict[str, torch.dtype]:
    """Of the first state of every parameter that has one."""
    states = {name: optimizer_of(trainer).state[param] for name, param in trainer.model.named_parameters()}
    return {name: state["exp_avg"].dtype for name, state in states.items() if state}


class Recorder(TrainerCallback):
    """Which of the callbacks about a step were called, and at which one."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.calls.append(("begin", state.global_step))

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.calls.append(("substep", state.global_step))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.calls.append(("pre", state.global_step))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.calls.append(("optimizer", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.calls.append(("end", state.global_step))

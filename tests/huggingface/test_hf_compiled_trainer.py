"""CompiledTrainer: the Trainer's run, bit for bit, in one graph a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import ParallelMode

import bnbops
from bnbops.compile import GraphBreakError
from bnbops.integrations.transformers import CompiledStep, CompiledTrainer, keep_embeddings_in_32_bits
from cases.hf import tiny_llama
from cases.hf_trainer import (
    Recorder,
    TinyLM,
    arguments,
    assert_same_run,
    examples,
    logged,
    state_dtypes,
    trainer_of,
)

AOT = {"compile_backend": "aot_eager"}
TRACED = {"compile_backend": "eager"}  # one graph as well, in half the time


def both(
    make: Callable[[], nn.Module], folder: Path, data: list[dict[str, Tensor]], extra: dict[str, Any], **options: Any
) -> tuple[Trainer, Trainer]:
    """A compiled run and the Trainer's, in which the same callbacks were called."""
    shared = {key: value for key, value in extra.items() if key not in ("compile_backend", "graph_per")}
    model = make()
    keep_embeddings_in_32_bits(model)
    plain = trainer_of(model, folder, data, extra={**shared, "callbacks": [Recorder()]}, **options)
    plain.train()
    extra = {**extra, "callbacks": [Recorder()]}
    compiled = trainer_of(make(), folder, data, CompiledTrainer, extra=extra, **options)
    compiled.train()
    calls = [next(c for c in t.callback_handler.callbacks if isinstance(c, Recorder)).calls for t in (compiled, plain)]
    assert calls[0] == calls[1]
    return compiled, plain


def test_a_run_with_everything_evaluated_saved_and_resumed(tmp_path: Path) -> None:
    """Dropout, a schedule of the learning rate, weight decay and clipping; evaluation and a checkpoint half-way."""
    options = {
        "max_grad_norm": 0.5,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    extra = {**AOT, "eval_dataset": examples(4, seed=2)}
    compiled, plain = both(lambda: TinyLM(dropout=0.2), tmp_path, examples(16), extra, **options)
    assert compiled.compiled_step.graph_count == 1
    assert_same_run(compiled, plain)
    assert logged(compiled) == logged(plain)
    assert len({rate for _, _, rate in logged(compiled)}) == 4
    losses = [[entry["eval_loss"] for entry in t.state.log_history if "eval_loss" in entry] for t in (compiled, plain)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2

    resumed = trainer_of(TinyLM(dropout=0.2), tmp_path, examples(16), CompiledTrainer, extra=extra, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_run(resumed, compiled)
    assert logged(resumed) == logged(compiled)
    dtypes = state_dtypes(resumed)
    assert dtypes["embedding.weight"] == torch.float32
    assert dtypes["head.weight"] == torch.uint8


def test_accumulation_in_one_graph_and_what_remains_of_an_epoch_in_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fourteen rows are three batches and a half, at two batches a step. bf16 autocast, no clipping."""
    options = {"gradient_accumulation_steps": 2, "bf16": True, "max_grad_norm": 0.0}
    compiled, plain = both(TinyLM, tmp_path, examples(14), TRACED, **options)
    assert compiled.compiled_step.graph_count == 2
    assert "graph 2 was compiled" in caplog.text
    assert "'input_ids': [2, 8]" in caplog.text
    assert_same_run(compiled, plain)
    for ours, theirs in zip(logged(compiled), logged(plain), strict=True):  # sums of losses, in another order
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.every_torch
def test_a_graph_for_each_micro_batch(tmp_path: Path) -> None:
    """A loss of the user's, which is not scaled by the number of items."""

    def loss_of(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum")
        return losses / num_items_in_batch

    extra = {**AOT, "graph_per": "micro_batch", "compute_loss_func": loss_of}
    compiled, plain = both(TinyLM, tmp_path, examples(12), extra, gradient_accumulation_steps=3, max_steps=2)
    assert compiled.compiled_step.graph_count == 3  # the first gradients, further ones, the update
    assert_same_run(compiled, plain)
    assert logged(compiled) == logged(plain)


@pytest.mark.every_torch
@pytest.mark.usefixtures("registered_with_peft")
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_adapters_on_frozen_quantized_layers_with_label_smoothing(quant: str, tmp_path: Path) -> None:
    """A llama whose frozen layers are quantized; only low-rank additions to attention train. Padding is masked."""
    data = [{**row, "attention_mask": torch.ones(8, dtype=torch.int64)} for row in examples(8)]
    data[0]["attention_mask"][-3:] = 0
    data[0]["labels"] = data[0]["labels"].where(data[0]["attention_mask"].bool(), -100)
    compiled, plain = both(
        lambda: _adapted_llama(quant), tmp_path, data, TRACED, label_smoothing_factor=0.1, max_steps=2
    )
    assert compiled.compiled_step.graph_count == 1
    assert logged(compiled) == logged(plain)
    assert_same_run(compiled, plain)
    assert all(".lora_" in name for name in state_dtypes(compiled))


def _adapted_llama(quant: str) -> nn.Module:
    model = tiny_llama(num_hidden_layers=1)
    bnbops.nn.quantize_(model, quant, progress=False)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def test_inductor_comes_close(tmp_path: Path) -> None:
    compiled, plain = both(TinyLM, tmp_path, examples(8), {}, max_steps=3)
    assert compiled.compiled_step.graph_count == 1
    for ours, theirs in zip(logged(compiled), logged(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_compile": True}, "torch_compile=True: leave it out"),
        ({"torch_empty_cache_steps": 5}, "torch_empty_cache_steps: leave it out"),
        ({"fp16": True}, "fp16 mixed precision: .* use bf16=True"),
    ],
)
def test_arguments_that_one_graph_cannot_have(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"CompiledTrainer cannot compile one graph with {message}"):
        trainer_of(TinyLM(), tmp_path, examples(4), CompiledTrainer, **options)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("is_deepspeed_enabled", "DeepSpeed: run one process"),
        ("is_fsdp_enabled", "FSDP: run one process"),
        ("is_distributed_loading_by_transformers", "a model sharded when it was loaded: run one process"),
    ],
)
def test_ways_to_shard_that_one_graph_cannot_have(flag: str, message: str, tmp_path: Path) -> None:
    """None is to be had in a test: the Trainer is told that it is there."""

    class Sharded(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            setattr(self, flag, True)

    with pytest.raises(ValueError, match=message):
        trainer_of(TinyLM(), tmp_path, examples(4), type("CompiledSharded", (CompiledStep, Sharded), {}))


def test_many_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel on 2 GPUs: set CUDA_VISIBLE_DEVICES to one"):
        CompiledTrainer(TinyLM(), args)
    monkeypatch.setattr(type(args), "parallel_mode", ParallelMode.DISTRIBUTED)
    with pytest.raises(ValueError, match="several processes"):
        CompiledTrainer(TinyLM(), arguments(tmp_path))


def test_activation_checkpointing_needs_eager_attention_and_one_backward_a_graph(tmp_path: Path) -> None:
    options = {"activation_checkpointing": True, "gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        trainer_of(tiny_llama(), tmp_path, examples(4), CompiledTrainer, **options)
    eager = tiny_llama(attn_implementation="eager")
    with pytest.raises(ValueError, match="graph_per='micro_batch'"):
        trainer_of(eager, tmp_path, examples(4), CompiledTrainer, **options)
    trainer_of(eager, tmp_path, examples(4), CompiledTrainer, extra={"graph_per": "micro_batch"}, **options)


@pytest.mark.parametrize("given", ["class", "object", "nothing"])
def test_optimizers_of_others(given: str, tmp_path: Path) -> None:
    model = TinyLM()
    extra = {
        "class": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
        "object": {"optimizers": (torch.optim.SGD(model.parameters(), 0.1), None)},
        "nothing": {},
    }[given]
    trainer = CompiledTrainer(model, arguments(tmp_path), train_dataset=examples(4), **extra)
    with pytest.raises(TypeError, match=r"needs an optimizer of bnbops\.optim, got (SGD|AdamW): pass e\.g\."):
        trainer.train()


def test_an_optimizer_that_was_handed_over(tmp_path: Path) -> None:
    """32-bit states of embeddings there, too. And a step that cannot be captured leaves everything as it was."""

    class Chatty(CompiledTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().compute_loss(*args, **kwargs)
            print(loss)
            return loss

    model = TinyLM()
    before = [param.clone() for param in model.parameters()]
    optimizer = bnbops.optim.AdamW8bit(model.parameters(), lr=1e-2)
    trainer = Chatty(
        model, arguments(tmp_path), train_dataset=examples(4), optimizers=(optimizer, None), compile_backend="eager"
    )
    with pytest.raises(GraphBreakError, match=r"Chatty.training_step\(\) cannot be compiled into one graph"):
        trainer.train()
    assert state_dtypes(trainer)["embedding.weight"] == torch.float32
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now, then)
        assert now.grad is None


def test_unknown_graphs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='graph_per must be "step" or "micro_batch"'):
        CompiledTrainer(TinyLM(), arguments(tmp_path), graph_per="epoch")

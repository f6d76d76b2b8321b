"""CompiledStep mixed into TRL's SFTTrainer, with the loss of transformers.Trainer: TRL's own cannot be in a graph."""

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

import bnbops
from bnbops.integrations.transformers import CompiledStep, keep_embeddings_in_32_bits
from cases.hf import tiny_llama, tiny_tokenizer, token_batch
from cases.hf_trainer import logged


class CompiledSFTTrainer(CompiledStep, SFTTrainer):
    compute_loss = Trainer.compute_loss


def test_it_trains_as_the_sft_trainer_does(tmp_path: Path) -> None:
    runs = []
    for cls, options in ((SFTTrainer, {}), (CompiledSFTTrainer, {"compile_backend": "eager"})):
        model = tiny_llama(num_hidden_layers=1)
        keep_embeddings_in_32_bits(model)
        args = SFTConfig(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = cls(
            model,
            args,
            train_dataset=Dataset.from_list([{"input_ids": row.tolist()} for row in token_batch(8)]),
            processing_class=tiny_tokenizer(),
            optimizer_cls_and_kwargs=(bnbops.optim.AdamW8bit, {"lr": 1e-3}),
            **options,
        )
        trainer.train()
        runs.append(trainer)
    plain, compiled = runs
    assert compiled.compiled_step.graph_count == 1
    for ours, theirs in zip(logged(compiled), logged(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert logged(plain)[2][0] < logged(plain)[0][0] - 0.01

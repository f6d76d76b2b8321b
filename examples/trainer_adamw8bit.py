"""Trains a small Llama on real text with Hugging Face's Trainer and bnbops' 8-bit AdamW.

    python examples/trainer_adamw8bit.py               # transformers.Trainer
    python examples/trainer_adamw8bit.py --compile     # CompiledTrainer: forward, backward and AdamW in one graph
    python examples/trainer_adamw8bit.py --data my_book.txt --steps 2000

It prints the held-out loss before and after, the bytes of the optimizer's state and the time of a step. The model's
weights go to out/model. Nothing is downloaded; a GPU is used where there is one.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from step_times import StepTimes
from text_data import Text, load_text
from torch import Tensor
from training import Parser, add_training_options, aligned, check_shape, positive_int, state_bytes
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import bnbops
from bnbops.integrations.transformers import CompiledTrainer, keep_embeddings_in_32_bits

HELD_OUT = 32  # windows of text that the loss is told of


@dataclass
class Result:
    """A finished run."""

    trainer: Trainer
    loss_before: float
    loss_after: float
    state_bytes: int
    torch_state_bytes: int  # of torch.optim.AdamW
    step_seconds: float


def windows(tokens: Tensor, length: int) -> list[dict[str, Tensor]]:
    """The text in pieces, one after another. Labels are the inputs: the model shifts them itself."""
    return [{"input_ids": piece, "labels": piece} for piece in tokens.split(length) if len(piece) == length]


def build_model(args: argparse.Namespace, vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.block_size,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 10),
        weight_decay=0.1,
        seed=args.seed,
        logging_steps=max(1, args.steps // 10),
        dataloader_drop_last=True,  # batches of one shape: one graph
        save_strategy="no",
        report_to=[],
    )


def train(args: argparse.Namespace, text: Text) -> Result:
    torch.manual_seed(args.seed)
    model = build_model(args, len(text.vocabulary))
    times = StepTimes()
    arguments = {
        "model": model,
        "args": training_arguments(args),
        "train_dataset": windows(text.train, args.block_size),
        "eval_dataset": windows(text.validation, args.block_size)[:HELD_OUT],
        "optimizer_cls_and_kwargs": (bnbops.optim.AdamW8bit, {"lr": args.lr, "betas": (0.9, 0.99)}),
        "callbacks": [times],
    }
    if args.compile:
        trainer = CompiledTrainer(**arguments, compile_backend=args.backend)
    else:
        keep_embeddings_in_32_bits(model)
        trainer = Trainer(**arguments)

    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(args.out / "model")
    torch_bytes = 2 * sum(param.nbytes for param in model.parameters() if param.requires_grad)
    median = statistics.median(times.seconds)
    return Result(trainer, before, after, state_bytes(trainer.optimizer), torch_bytes, median)


def table(result: Result) -> str:
    compiled = getattr(result.trainer, "compiled_step", None)
    rows = [
        ("", type(result.trainer).__name__),
        ("parameters", f"{result.trainer.model.num_parameters():,}"),
        ("held-out loss before", f"{result.loss_before:.3f}"),
        ("held-out loss after", f"{result.loss_after:.3f}"),
        ("optimizer state, bytes", f"{result.state_bytes:,}"),
        ("torch.optim.AdamW's, bytes", f"{result.torch_state_bytes:,}"),
        ("median step, ms", f"{1000 * result.step_seconds:.1f}"),
        ("graphs", "eager" if compiled is None else str(compiled.graph_count)),
    ]
    return aligned(rows)


def parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_options(parser)
    parser.set_defaults(steps=60, vocabulary=2048, layers=4, width=256, heads=4)
    parser.add_argument("--accumulate", type=positive_int, default=1, help="batches of a step (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="one graph a step, by CompiledTrainer")
    return parser


def main(argv: Sequence[str] | None = None) -> Result:
    cli = parser()
    args = cli.parse_args(argv)
    try:
        check_shape(args)
        text = load_text(args.data, args.vocabulary, args.block_size)
    except (ValueError, OSError) as error:
        cli.error(str(error))
    result = train(args, text)
    print(table(result))
    return result


if __name__ == "__main__":
    main()

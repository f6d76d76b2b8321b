"""QLoRA with TRL's SFTTrainer, PEFT and Transformers: the code is as for bitsandbytes, but for one line.

    pip install "bnbops[hf]"
    python examples/qlora_sft.py                  # trains a small base first: nothing is downloaded
    python examples/qlora_sft.py --model PATH --data my_text.txt

The base is loaded in 4 bits and frozen, adapters train beside its layers with a paged 8-bit AdamW, and are merged in
the end (Dettmers et al., arXiv:2305.14314). The text is Python's language reference, unless --data names another.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import bnbops

bnbops.install_as_bitsandbytes()  # the one line

from datasets import Dataset  # noqa: E402
from local_llama import documents, make_llama, prose, windows  # noqa: E402
from peft import LoraConfig, PeftModel  # noqa: E402
from step_times import StepTimes  # noqa: E402
from torch import nn  # noqa: E402
from training import Parser, aligned, positive_float, positive_int, state_bytes  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "The "


def load(folder: Path) -> nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map=DEVICE
    )


def trainer_of(folder: Path, args: argparse.Namespace) -> SFTTrainer:
    """On windows of the text, with adapters on every linear layer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = prose() if args.data is None else documents(args.data)
    train, held_out = (
        Dataset.from_dict({"input_ids": rows.tolist()}) for rows in windows(tokenizer, texts, args.block_size)
    )
    config = SFTConfig(
        output_dir=str(args.out / "trainer"),
        optim="paged_adamw_8bit",
        max_steps=args.steps,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        max_length=args.block_size,
        bf16=True,
        use_cpu=DEVICE == "cpu",
        gradient_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    adapters = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(
        load(folder),
        config,
        train_dataset=train,
        eval_dataset=held_out.select(range(min(len(held_out), args.eval_windows))),
        processing_class=tokenizer,
        peft_config=adapters,
    )


def held(model: nn.Module, trained: bool) -> int:
    """Bytes of the parameters that train, or of those that do not."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad is trained)


def sample(model: PeftModel | nn.Module, tokenizer: Any, tokens: int) -> str:
    """The merged model's continuation of the prompt."""
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False).to(DEVICE)
    out = model.eval().generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0])


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    cli = Parser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, count = cli.add_argument, positive_int
    add("--model", type=Path, help="a folder with a causal language model; one is made if none is given")
    add("--data", type=Path, help="a text file or a folder of them; else Python's language reference")
    add("--out", type=Path, default=Path("qlora-sft-out"), help="the folder for models")
    add("--steps", type=count, default=60, help="optimizer steps")
    add("--batch-size", type=count, default=4, help="windows of text in a step")
    add("--block-size", type=count, default=128, help="tokens of a window")
    add("--eval-windows", type=count, default=32, help="to validate on, at most")
    add("--lr", type=positive_float, default=2e-3, help="the peak of the learning rate")
    add("--rank", type=count, default=16, help="of the adapters")
    add("--seed", type=int, default=0, help="decides adapters and the order of the text")
    add("--base-steps", type=count, default=60, help="training of the base that is made")
    add("--base-width", type=count, default=256, help="of the base that is made")
    add("--tokens", type=count, default=40, help="to generate in the end")
    args = cli.parse_args(argv)
    if args.model is not None and not (args.model / "config.json").exists():
        cli.error(f"no model in {args.model}")
    folder = args.model or make_llama(args.out / "base", args.base_width, 4, args.base_steps)
    try:
        trainer = trainer_of(folder, args)
    except (ValueError, OSError) as error:
        cli.error(str(error))
    times = StepTimes()
    trainer.add_callback(times)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    frozen, trained = held(trainer.model, trained=False), held(trainer.model, trained=True)
    states = state_bytes(trainer.optimizer.optimizer)

    trainer.model.save_pretrained(args.out / "adapters")
    merged = trainer.model.merge_and_unload()
    print(f"\n--- the merged model continues {PROMPT!r} ---\n{sample(merged, trainer.processing_class, args.tokens)}\n")
    rows = [
        ("", "QLoRA"),
        ("validation loss before", f"{before:.4f}"),
        ("validation loss after", f"{after:.4f}"),
        ("frozen weights, bytes", f"{frozen:,}"),
        ("trained parameters, bytes", f"{trained:,}"),
        ("optimizer state, bytes", f"{states:,}"),
        ("step time, median", f"{statistics.median(times.seconds) * 1e3:.0f} ms"),
    ]
    print(aligned(rows))
    return {"before": before, "after": after, "frozen": frozen, "trained": trained, "states": states}


if __name__ == "__main__":
    main()

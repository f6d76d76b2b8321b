"""Loads a language model in 4 (or 8) bits with Transformers, generates, saves it quantized, and loads that again.

    pip install "bnbops[hf]"
    python examples/load_4bit_generate.py                   # trains a small model first: nothing is downloaded
    python examples/load_4bit_generate.py --model PATH --quant int8

Each weight is quantized as soon as it is read, so the float model is never whole in memory. Fails if the reloaded model
generates other tokens.
"""

import argparse
import ctypes
import gc
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from local_llama import make_llama
from training import Parser, positive_int
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bnbops.integrations.transformers import BnbOpsConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATUS = Path("/proc/self/status")


class Peak:
    """Bytes of memory of the device that a block took at most; 0 where the system does not tell."""

    bytes = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    give_back()
    peak, before, done = Peak(), held(), threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak.bytes = max(peak.bytes, held() - before)

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        if DEVICE == "cuda":
            peak.bytes = torch.cuda.max_memory_allocated() - before


def give_back() -> None:
    """What was freed goes back to the system; else new tensors take its place unseen."""
    gc.collect()
    if STATUS.exists():
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # glibc has it


def held() -> int:
    """Of the CPU's memory: without mapped files, such as the checkpoint."""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated()
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def size(model: PreTrainedModel) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """A float model is quantized by `quantization_config`; a saved quantized one brings its own."""
    with peak_memory() as peak:
        began = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=DEVICE, **options)
        seconds = time.perf_counter() - began
    print(f"loaded {folder} in {seconds:.2f} s: {size(model):,} bytes, at most {peak.bytes:,} while loading")
    return model.eval()


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> torch.Tensor:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(DEVICE)
    began = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    made = out.shape[1] - inputs["input_ids"].shape[1]
    print(f"generated {made} tokens, {made / (time.perf_counter() - began):.0f} a second")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    cli = Parser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    cli.add_argument("--model", type=Path, help="a folder with a causal language model; one is made if none is given")
    cli.add_argument("--quant", choices=["nf4", "fp4", "int8"], default="nf4", help="what weights become")
    cli.add_argument("--prompt", default="def main(", help="to continue")
    cli.add_argument("--tokens", type=positive_int, default=48, help="how many to generate")
    cli.add_argument("--out", type=Path, default=Path("load-4bit-out"), help="the folder for models")
    cli.add_argument("--base-steps", type=positive_int, default=100, help="training of the model that is made")
    cli.add_argument("--base-width", type=positive_int, default=256, help="of the model that is made")
    args = cli.parse_args(argv)
    if args.model is not None and not (args.model / "config.json").exists():
        cli.error(f"no model in {args.model}")
    folder = args.model or make_llama(args.out / "base", args.base_width, 4, args.base_steps)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    model = load(folder, quantization_config=BnbOpsConfig(args.quant))
    tokens = generate(model, tokenizer, args.prompt, args.tokens)
    print(f"\n{tokenizer.decode(tokens[0])}\n")

    quantized = args.out / args.quant
    model.save_pretrained(quantized)
    tokenizer.save_pretrained(quantized)
    again = generate(load(quantized), tokenizer, args.prompt, args.tokens)
    if not torch.equal(again, tokens):
        raise SystemExit("the reloaded model generates other tokens")
    print("the reloaded model generates the same tokens")


if __name__ == "__main__":
    main()

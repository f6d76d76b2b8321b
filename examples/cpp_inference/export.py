"""Quantizes a small classifier of token sequences and compiles it ahead of time, for main.cpp to run without Python.

    python examples/cpp_inference/export.py --out inference-out

Writes classifier.pt2, the compiled package; tokens.txt, sequences to classify, one a line; expected.txt, what the
uncompiled model makes of them in Python: the logits, one line for each sequence, as main.cpp prints them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import bnbops

VOCABULARY, LENGTH, CLASSES = 256, 12, 5


class Classifier(nn.Module):
    """Tokens `[batch, length]`, int64, to logits `[batch, classes]`: the largest value of each feature over the
    sequence, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 64)
        self.hidden = nn.Linear(64, 128)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.embedding(tokens).amax(1)
        return self.head(self.hidden(features).relu())


def quantized() -> Classifier:
    """The table and the hidden layer in 4 bits, the head in 8."""
    torch.manual_seed(0)
    model = Classifier().eval().requires_grad_(False)
    bnbops.nn.quantize_(model, "nf4", skip=["head"], embeddings=True, progress=False)
    return bnbops.nn.quantize_(model, "int8", progress=False)


def compiled(model: nn.Module, path: Path) -> Path:
    """A package that takes any number of sequences of any length."""
    tokens = torch.zeros(4, LENGTH, dtype=torch.int64)
    sizes = {0: torch.export.Dim("sequences", min=1, max=4096), 1: torch.export.Dim("length", min=1, max=4096)}
    program = torch.export.export(model, (tokens,), dynamic_shapes=(sizes,))
    return Path(torch._inductor.aoti_compile_and_package(program, package_path=str(path)))


def lines(table: Tensor) -> str:
    """Integers as they are, floats with the nine digits that tell any two of 32 bits apart."""
    text = str if table.dtype == torch.int64 else "{:.9g}".format
    return "".join(" ".join(map(text, row)) + "\n" for row in table.tolist())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("inference-out"), help="the folder to write to (%(default)s)")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    model = quantized()
    tokens = torch.randint(VOCABULARY, (6, LENGTH))
    (out / "tokens.txt").write_text(lines(tokens))
    (out / "expected.txt").write_text(lines(model(tokens)))
    package = compiled(model, out / "classifier.pt2")
    print(f"written to {out}: {package.name}, tokens.txt, expected.txt\nthe operators are in {bnbops.library_path()}")


if __name__ == "__main__":
    main()

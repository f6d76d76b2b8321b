"""Compares bnbops with bitsandbytes under Transformers and PEFT: outputs first, then speed, load time and memory.

    make bench-hf                  # makes bitsandbytes' environment first, and writes docs/huggingface_numbers.md
    python benchmarks/huggingface.py --bitsandbytes PYTHON [--quick] [--write]
    python benchmarks/huggingface.py --bitsandbytes PYTHON --record tests/golden

PYTHON is that of an environment with bitsandbytes and without bnbops, which would stand in for it. Each library has a
process of its own (huggingface_worker.py), as have dense layers; they make the same calls, in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_outputs as outputs
from huggingface_outputs import Task
from huggingface_process import Process
from measure import VerificationError, table
from quantize_encoder import get_model_path, reference_sentences

PAGE = Path(__file__).parents[1] / "docs" / "huggingface_numbers.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"
DENSE, THEIRS, OURS = LIBRARIES = "dense", "bitsandbytes", "bnbops"
OPTIMIZERS = "adamw_8bit", "paged_adamw_8bit"

Calls = dict[str, tuple["Row", Callable[[Process], float]]]


@dataclass
class Row:
    """What each library takes: seconds, or bytes; less is better. It is shown as `count` over it, or as itself."""

    name: str
    count: float | None = None
    scale: float = 1.0
    digits: int = 0
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, library: str, *values: float) -> None:
        self.values.setdefault(library, []).extend(values)

    def cells(self) -> dict[str, str | None]:
        medians = {library: statistics.median(values) for library, values in self.values.items()}
        shown = {library: self.count / m if self.count else m * self.scale for library, m in medians.items()}
        return {
            "name": self.name,
            **{library: f"{shown[library]:.{self.digits}f}" for library in LIBRARIES},
            "against bitsandbytes": f"{medians[THEIRS] / medians[OURS]:.2f}x",
        }


COLUMNS = {name: "{}" for name in ("name", *LIBRARIES, "against bitsandbytes")}


@dataclass(frozen=True)
class Sizes:
    """How much is done; `--quick` does little, on a tiny model."""

    llama: dict[str, int]
    rounds: int
    repeats: int  # of what takes long
    generated: int
    prompt: int
    sentences: int
    steps: int


FULL = Sizes(outputs.LLAMA, rounds=4, repeats=3, generated=32, prompt=512, sentences=32, steps=3)
QUICK = Sizes(outputs.TINY, rounds=1, repeats=1, generated=4, prompt=32, sentences=4, steps=1)


class Benchmark:
    def __init__(self, processes: dict[str, Process], folder: Path, sizes: Sizes) -> None:
        self.processes, self.folder, self.sizes, self.out = processes, folder, sizes, folder / "out"
        self.llama = Task(outputs.make_llama(folder / "llama", sizes.llama), self.tokens(2, 16))
        encoder, sentences = Path(get_model_path()), reference_sentences()[: sizes.sentences]
        inputs = outputs.make_sentences(folder / "sentences", encoder, sentences)
        self.encoder = Task(encoder, inputs, encoder=True)

    def tokens(self, *shape: int) -> Path:
        path = self.folder / f"tokens-{'x'.join(map(str, shape))}"
        return outputs.make_tokens(path, self.sizes.llama["vocab_size"], *shape)

    def compared(self) -> list[dict[str, Any]]:
        """Rows of distances. Raises VerificationError where bnbops is too far off."""
        cases = [(self.llama, scheme, "fp32") for scheme in outputs.SCHEMES]
        cases += [(self.llama, scheme, "bf16") for scheme in ("nf4 double", "int8")]
        cases += [(self.encoder, scheme, dtype) for scheme in ("nf4", "int8") for dtype in ("fp32", "bf16")]
        rows = []
        for task, scheme, dtype in cases:
            rows.append(outputs.compare(self.processes, task, scheme, dtype, self.out))
            outputs.verify(rows[-1])
            print(f"verified {rows[-1]['name']}: {rows[-1]['bnbops']:.1e} off", flush=True)
        return rows

    def loaded(self, task: Task, scheme: str, dtype: str) -> list[Row]:
        """Leaves the model in every process."""
        seconds, size = Row("load, s", digits=2), Row("weights, MB", scale=1e-6, digits=1)
        peak = Row("peak memory while loading, MB", scale=1e-6, digits=1)
        relative = Row("peak over weights", digits=2)
        for _ in range(self.sizes.repeats):
            for library, process in self.processes.items():
                process.free()
                load = outputs.arguments(task, None if library == DENSE else scheme, dtype)
                answer, taken = process.load(**load), max(process.peak, 1)
                seconds.add(library, answer["seconds"])
                size.add(library, answer["bytes"])
                peak.add(library, taken)
                relative.add(library, taken / answer["bytes"])
        return [seconds, size, peak, relative]

    def timed(self, *calls: tuple[Row, Callable[[Process], float]]) -> list[Row]:
        """The processes take turns; the first turn warms up."""
        for turn in range(self.sizes.rounds + 1):
            for row, call in calls:
                for library, process in self.processes.items():
                    seconds = call(process)
                    if turn:
                        row.add(library, seconds)
        return [row for row, _ in calls]

    def language_model(self, scheme: str, dtype: str) -> list[Row]:
        generated, prompt = self.sizes.generated, self.sizes.prompt
        rows = self.loaded(self.llama, scheme, dtype)

        def generate(sequences: int) -> tuple[Row, Callable[[Process], float]]:
            ids = self.tokens(sequences, 8)
            row = Row(f"generate, sequences: {sequences}, tokens/s", sequences * generated)
            return row, lambda process: process.generate(inputs=ids, tokens=generated)["seconds"]

        ids, row = self.tokens(1, prompt), Row(f"prompt of {prompt} tokens, tokens/s", prompt)
        return self.timed(generate(1), generate(8), (row, lambda p: p.outputs(inputs=ids, out=self.out))) + rows

    def sentence_encoder(self, scheme: str, dtype: str) -> list[Row]:
        rows = self.loaded(self.encoder, scheme, dtype)
        row = Row("sentences/s", self.sizes.sentences)
        return self.timed((row, lambda p: p.outputs(inputs=self.encoder.inputs, out=self.out))) + rows

    def training(self, scheme: str, dtype: str) -> list[Row]:
        """Steps of Trainers with adapters on the model; dense layers take torch's AdamW."""
        batch, rows = self.tokens(4, min(128, self.sizes.prompt)), []
        for library, process in self.processes.items():
            process.load(**outputs.arguments(self.llama, None if library == DENSE else scheme, dtype))
            process.adapt()
        for optimizer in OPTIMIZERS:
            step = Row(f"step with {optimizer}, ms", scale=1e3)
            part = Row("- of which the optimizer", scale=1e3, digits=1)
            for _ in range(self.sizes.repeats):
                for library, process in self.processes.items():
                    name = "adamw_torch" if library == DENSE else optimizer
                    times = process.train(
                        inputs=batch, optimizer=name, steps=self.sizes.steps, folder=self.folder / "trainer"
                    )
                    step.add(library, *times["steps"])
                    part.add(library, *times["optimizer"])
            rows += [step, part]
        return rows

    def sections(self) -> list[tuple[str, list[Row]]]:
        """Titles and rows."""
        double, int8 = outputs.SCHEMES["nf4 double"], outputs.SCHEMES["int8"]
        parts: list[tuple[str, Callable[[], list[Row]]]] = [
            (f"Llama, {double}, bf16", lambda: self.language_model("nf4 double", "bf16")),
            (f"Llama, {double}, fp32", lambda: self.language_model("nf4 double", "fp32")),
            (f"Llama, {int8}, bf16", lambda: self.language_model("int8", "bf16")),
            ("Sentence encoder, NF4, fp32", lambda: self.sentence_encoder("nf4", "fp32")),
            ("Sentence encoder, NF4, bf16", lambda: self.sentence_encoder("nf4", "bf16")),
            (f"Sentence encoder, {int8}, fp32", lambda: self.sentence_encoder("int8", "fp32")),
            (f"QLoRA: Llama, {double}, bf16, adapters of rank 16", lambda: self.training("nf4 double", "bf16")),
        ]
        result = []
        for title, measure in parts:
            result.append((title, measure()))
            print(f"\n{section(*result[-1])}", flush=True)
        return result


def section(title: str, rows: list[Row]) -> str:
    return f"### {title}\n\n{table([row.cells() for row in rows], COLUMNS)}\n"


def write(text: str) -> None:
    """Puts the text between the markers of the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main(argv: list[str] | None = None) -> None:
    cli = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    cli.add_argument("--bitsandbytes", required=True, metavar="PYTHON", help="of the environment that has it")
    cli.add_argument("--quick", action="store_true", help="a tiny model: shows that it works, measures nothing")
    cli.add_argument("--rounds", type=int, help="turns of each call; enough by default")
    cli.add_argument("--write", action="store_true", help=f"write the tables to docs/{PAGE.name}")
    cli.add_argument("--json", type=Path, metavar="FILE", help="also write every single figure to FILE")
    cli.add_argument("--record", type=Path, metavar="FOLDER", help="write bitsandbytes' outputs for the tests instead")
    args = cli.parse_args(argv)
    pythons = {DENSE: sys.executable, THEIRS: args.bitsandbytes, OURS: sys.executable}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)

        def process(library: str) -> Process:
            return stack.enter_context(closing(Process(library, pythons[library], folder / f"{library}.log")))

        if args.record:
            outputs.record(process(THEIRS), folder, args.record)
            return
        sizes = QUICK if args.quick else FULL
        if args.rounds:
            sizes = dataclasses.replace(sizes, rounds=args.rounds, repeats=args.rounds)
        benchmark = Benchmark({library: process(library) for library in LIBRARIES}, folder, sizes)
        versions = benchmark.processes[THEIRS].versions()
        distances = benchmark.compared()
        machine = (
            f"bitsandbytes {versions['library']}, torch {versions['torch']}, Transformers {versions['transformers']}, "
            f"threads: {versions['threads']}"
        )
        parts = [f"{machine}.\n\n### Outputs\n\n{table(distances, outputs.COLUMNS)}\n"]
        print(parts[0], flush=True)
        sections = benchmark.sections()
        parts += [section(*part) for part in sections]
        if args.write:
            write("\n".join(parts))
        if args.json:
            figures = {title: {row.name: row.values for row in rows} for title, rows in sections}
            args.json.write_text(
                json.dumps({"versions": versions, "outputs": distances, "sections": figures}, indent=1)
            )


if __name__ == "__main__":
    try:
        main()
    except VerificationError as error:
        sys.exit(f"verification failed: {error}")

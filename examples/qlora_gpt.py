"""Fine-tunes the GPT of train_gpt.py on other text: all of its fp32 weights, or adapters beside its weights in 4 bits.

    python examples/qlora_gpt.py                                             # trains a base first, then tunes it
    python examples/train_gpt.py --optimizer adamw8bit --steps 300 --save-every 300
    python examples/qlora_gpt.py --checkpoint out/adamw8bit-300.pt --data my_book.txt

The second run is QLoRA (Dettmers et al., arXiv:2305.14314): linear layers are frozen in NF4 with doubly quantized
scales, adapters of low rank train beside them with AdamW8bit, and a step (forward, backward, clipping, update) is one
compiled graph. The first run is what that replaces: torch's fp32 AdamW on every weight. The text is Python's language
reference, prose where the base has seen code, unless --data names another.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import train_gpt
from gpt import GPT
from text_data import Text, as_text, language_reference, load_text, read_documents
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from training import SHAPE, Parser, lr_factor, positive_float, positive_int, state_bytes, train_step

import bnbops

DENSE, QLORA = "fp32, all weights", "QLoRA"
PROMPT = b"The "


class LoRA(nn.Module):
    """A frozen linear layer plus `up @ down` of low rank (Hu et al., arXiv:2106.09685, section 4.1).

    `up` starts as zeros, so that the layer starts as the frozen one.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up) * self.scale


@dataclass
class Run:
    """A fine-tuning run and what it took."""

    name: str
    lr: float
    weights: int  # bytes that do not train
    trained: int  # bytes of the parameters that do
    states: int = 0  # bytes
    graphs: str = ""
    validation_before: float = math.nan
    validation_after: float = math.nan
    train_loss: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    sample: str = ""

    @property
    def step(self) -> float:
        return statistics.median(self.step_seconds)


def dense(base: GPT, args: argparse.Namespace) -> tuple[GPT, torch.optim.Optimizer]:
    """The fp32 model, all of which trains."""
    return base, torch.optim.AdamW(base.parameters(), lr=args.dense_lr, betas=(0.9, 0.99), fused=True)


def qlora(base: GPT, args: argparse.Namespace) -> tuple[GPT, torch.optim.Optimizer]:
    """The same model with its linear layers in NF4, frozen, and adapters on each."""
    bnbops.nn.quantize_(base, "nf4", double_quant=True, progress=False)
    base.requires_grad_(False)
    for name, module in list(base.named_modules()):
        if isinstance(module, bnbops.nn.Linear4bit):
            base.set_submodule(name, LoRA(module, args.rank, args.alpha))
    adapters = [parameter for parameter in base.parameters() if parameter.requires_grad]
    return base, bnbops.optim.AdamW8bit(adapters, lr=args.lr, betas=(0.9, 0.99))


RUNS: dict[str, Callable[[GPT, argparse.Namespace], tuple[GPT, torch.optim.Optimizer]]] = {DENSE: dense, QLORA: qlora}


def build_step(
    name: str, model: GPT, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], str]]:
    """One training step, and a function that tells how many graphs it was compiled to."""
    if name == DENSE:
        return train_gpt.build_step(args, train_gpt.BASELINE, model, optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = train_step(model.loss, trained, optimizer)
    if not args.compile:
        return step, lambda: "eager"
    compiled = bnbops.compiled_train_step(step, optimizer, backend=args.backend)
    return compiled, lambda: str(compiled.graph_count)


def tune(name: str, weights: dict[str, Tensor], shape: dict[str, int], text: Text, args: argparse.Namespace) -> Run:
    torch.compiler.reset()
    torch.manual_seed(args.seed)
    base = GPT(len(text.vocabulary), **shape)
    base.load_state_dict(weights)
    model, optimizer = RUNS[name](base, args)
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, args.steps))
    step, graphs = build_step(name, model, optimizer, args)

    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rest = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    rest += [buffer for buffer in model.buffers()]
    lr = optimizer.param_groups[0]["initial_lr"]
    run = Run(name, float(lr), sum(tensor.nbytes for tensor in rest), sum(tensor.nbytes for tensor in trains))
    run.validation_before = train_gpt.evaluate(model, text, args)
    progress = tqdm(range(args.steps), desc=name, unit="step")
    for index in progress:
        batch = text.batch("train", args.seed, index, args.batch_size, args.block_size)
        began = time.perf_counter()
        run.train_loss.append(step(*batch).item())
        run.step_seconds.append(time.perf_counter() - began)
        scheduler.step()
        progress.set_postfix(loss=f"{run.train_loss[-1]:.3f}")
    run.validation_after = train_gpt.evaluate(model, text, args)
    run.states, run.graphs = state_bytes(optimizer), graphs()
    generator = torch.Generator().manual_seed(args.seed)
    run.sample = text.vocabulary.decode(model.generate(text.vocabulary.encode(PROMPT), 60, 0.8, generator))
    if name == QLORA:
        torch.save(
            {key: value for key, value in model.state_dict().items() if key.endswith((".down", ".up"))},
            args.out / "adapters.pt",
        )
    return run


# ------------------------------------------------------------------------------------------------------------- report


def table(runs: Sequence[Run]) -> str:
    """The runs side by side, one column each."""
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("", lambda run: run.name),
        ("peak learning rate", lambda run: f"{run.lr:g}"),
        ("validation loss before", lambda run: f"{run.validation_before:.4f}"),
        ("validation loss after", lambda run: f"{run.validation_after:.4f}"),
        ("train loss, first 5 steps", lambda run: f"{statistics.fmean(run.train_loss[:5]):.4f}"),
        ("train loss, last 20 steps", lambda run: f"{statistics.fmean(run.train_loss[-20:]):.4f}"),
        ("frozen weights, bytes", lambda run: f"{run.weights:,}"),
        ("trained parameters, bytes", lambda run: f"{run.trained:,}"),
        ("their gradients, bytes", lambda run: f"{run.trained:,}"),
        ("optimizer state, bytes", lambda run: f"{run.states:,}"),
        ("all four", lambda run: f"{run.weights + 2 * run.trained + run.states:,}"),
        ("first step, with compilation", lambda run: f"{run.step_seconds[0]:.1f} s"),
        ("step time, median", lambda run: f"{run.step * 1e3:.0f} ms"),
        ("  against fp32", lambda run: f"{run.step / runs[0].step:.2f}x"),
        ("graphs per step", lambda run: run.graphs),
    ]
    lines = [f"{label:30}" + "".join(f"{cell(run):>20}" for run in runs) for label, cell in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- command line


def parser() -> Parser:
    result = Parser(description=__doc__.partition("\n")[0])
    add, count, number = result.add_argument, positive_int, positive_float
    backends = torch.compiler.list_backends(exclude_tags=())
    add("--checkpoint", type=Path, help="what train_gpt.py saved (default: a base is trained first)")
    add("--base-data", type=Path, help="the text that the base was trained on, as for train_gpt.py")
    add("--base-steps", type=count, default=100, help="steps of the base if it has to be trained (%(default)s)")
    add("--data", type=Path, help="a text file or a folder of them to tune on (default: Python's language reference)")
    add("--out", type=Path, default=Path("qlora-out"), help="the folder that everything is written to (%(default)s)")
    add("--steps", type=count, default=100, help="optimizer steps of a run (%(default)s)")
    add("--batch-size", type=count, default=4, help="windows of text in a step (%(default)s)")
    add("--lr", type=number, default=5e-3, help="the peak of the adapters' learning rate (%(default)s)")
    add("--dense-lr", type=number, default=3e-4, help="the peak of the fp32 weights' learning rate (%(default)s)")
    add("--rank", type=count, default=16, help="of the adapters (%(default)s)")
    add("--alpha", type=number, default=16.0, help="the adapters are scaled by alpha / rank (%(default)s)")
    add("--seed", type=int, default=0, help="decides adapters and the order of the text (%(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the steps (the default)")
    add("--backend", choices=backends, default="inductor", metavar="NAME", help="torch.compile's backend (%(default)s)")
    add("--threads", type=count, help="CPU threads (default: PyTorch's choice)")
    return result


def main(argv: Sequence[str] | None = None) -> list[Run]:
    cli = parser()
    args = cli.parse_args(argv)
    try:
        checkpoint = train_gpt.load(args.checkpoint or train_base(args))
        text = text_to_tune_on(checkpoint["config"], args)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        cli.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = {key: checkpoint["config"][key] for key in SHAPE}
    weights = {name: tensor.float() for name, tensor in checkpoint["model"].items()}
    runs = [tune(name, weights, shape, text, args) for name in RUNS]
    (args.out / "table.txt").write_text(table(runs) + "\n")
    for run in runs:
        print(f"\n--- {run.name} continues {PROMPT.decode()!r} ---\n{run.sample}")
    print(f"\n{table(runs)}\n\nwritten to {args.out}: adapters.pt, table.txt")
    return runs


def train_base(args: argparse.Namespace) -> Path:
    """A checkpoint of train_gpt.py, trained with its defaults."""
    options = ["--optimizer", "adamw8bit", "--steps", args.base_steps, "--save-every", args.base_steps]
    options += ["--out", args.out, "--backend", args.backend, "--compile" if args.compile else "--no-compile"]
    options += ["--data", args.base_data] if args.base_data else []
    options += ["--threads", args.threads] if args.threads else []
    train_gpt.main([str(option) for option in options])
    return args.out / f"adamw8bit-{args.base_steps}.pt"


def text_to_tune_on(config: dict[str, Any], args: argparse.Namespace) -> Text:
    """In the tokens of the text that the base was trained on."""
    args.block_size = config["block_size"]
    base = load_text(args.base_data, config["vocabulary"], args.block_size)
    if base.digest != config["data"]:
        raise ValueError(
            f"the checkpoint was trained on other text than {args.base_data or 'the standard library'}; "
            "name it by --base-data"
        )
    if args.data is not None:
        return as_text(read_documents(args.data), base.vocabulary, args.block_size, str(args.data))
    documents = [topic.encode() for topic in language_reference()]
    return as_text(documents, base.vocabulary, args.block_size, "the language reference")


if __name__ == "__main__":
    main()

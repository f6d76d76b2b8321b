"""Trains on 2 processes, resumes the run on 4 and on 1 from its checkpoint, and sets the losses side by side.

    python examples/demo_fsdp.py                            # or: make demo-fsdp
    python examples/demo_fsdp.py --mode ddp --optimizer Lion8bit

Other options go to train_fsdp.py, which says why the losses are not the same to the last bit. Exits with 1 where they
are further apart than --bound.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from training import Parser, aligned, positive_float, positive_int

SCRIPT = Path(__file__).with_name("train_fsdp.py")
RANKS = 2  # of the uninterrupted run
RESUMED = (4, 1)
MODEL = ["--vocabulary=2048", "--layers=4", "--width=256", "--heads=4", "--block-size=128", "--batch-size=8"]
BEFORE = 3  # steps that are shown before the resume
Run = dict[str, Any]  # a history.json


def torchrun(ranks: int, out: Path, *options: str) -> Run:
    """Runs train_fsdp.py on this many processes."""
    arguments = [f"--nproc-per-node={ranks}", os.path.relpath(SCRIPT), *options, f"--out={out}"]
    print("\n$ torchrun", shlex.join(arguments), flush=True)
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    if torch.cuda.device_count() < max(RESUMED):
        environment["CUDA_VISIBLE_DEVICES"] = ""  # they share the CPU
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    if code := subprocess.run(command, env=environment).returncode:
        raise SystemExit(code)
    return json.loads((out / "history.json").read_text())


def name(run: Run) -> str:
    ranks = len(run["state_bytes"])
    return f"{ranks} process" if ranks == 1 else f"{ranks} processes"


def differences(whole: Run, resumed: Run) -> list[float]:
    """Of the losses, in nats."""
    return [ours - theirs for ours, theirs in zip(resumed["losses"], whole["losses"], strict=True)]


def losses_table(whole: Run, resumed: Sequence[Run]) -> str:
    """The losses around the resume, and how far they are from the uninterrupted run's."""
    start = resumed[0]["resumed_at"]
    rows = [("step", name(whole), *(head for run in resumed for head in (f"{name(run)}, resumed", "difference")))]
    for step in range(max(0, start - BEFORE), len(whole["losses"])):
        cells = [f"{whole['losses'][step]:.7f}"]
        for run in resumed:
            after = (f"{run['losses'][step]:.7f}", f"{differences(whole, run)[step]:+.1e}")
            cells += after if step >= start else ("", "")
        rows.append((str(step + 1), *cells))
    return aligned(rows)


def states_table(runs: Sequence[Run]) -> str:
    """Bytes on the rank with most of them."""
    runs = sorted(runs, key=lambda run: len(run["state_bytes"]))
    ours, theirs = ([max(run[key]) for run in runs] for key in ("state_bytes", "adamw_bytes"))
    rows = [("optimizer state, bytes a process", *map(name, runs))]
    rows.append(("torch.optim.AdamW", *(f"{size:,}" for size in theirs)))
    rows.append((runs[0]["config"]["optimizer"], *(f"{size:,}" for size in ours)))
    rows.append(("  against AdamW", *(f"{size / whole:.3f}" for size, whole in zip(ours, theirs, strict=True))))
    return aligned(rows)


def main(argv: Sequence[str] | None = None) -> None:
    cli = Parser(description=__doc__.partition("\n")[0])
    cli.add_argument("--out", type=Path, default=Path("fsdp-out"), help="the folder for all output (%(default)s)")
    cli.add_argument("--steps", type=positive_int, default=30, help="of the uninterrupted run (%(default)s)")
    cli.add_argument("--resume-at", type=positive_int, default=20, metavar="STEP", help="(%(default)s)")
    cli.add_argument("--bound", type=positive_float, default=1e-4, help="for differences, in nats (%(default)s)")
    args, others = cli.parse_known_args(argv)
    if args.resume_at >= args.steps:
        cli.error(f"--resume-at {args.resume_at} is not before the end: --steps {args.steps}")

    options = [*MODEL, f"--steps={args.steps}", *others]
    whole = torchrun(RANKS, args.out / "whole", *options, f"--save-every={args.resume_at}")
    checkpoint = args.out / "whole" / f"step-{args.resume_at}"
    resumed = [torchrun(n, args.out / f"resumed-{n}", *options, f"--resume={checkpoint}") for n in RESUMED]
    largest = max(abs(difference) for run in resumed for difference in differences(whole, run))
    report = f"{losses_table(whole, resumed)}\n\n{states_table([whole, *resumed])}\n"
    report += f"\nlargest difference: {largest:.1e} nats (bound: {args.bound:g})\n"
    (args.out / "table.txt").write_text(report)
    print(f"\n{report}")
    if largest > args.bound:
        raise SystemExit("the resumed runs do not continue the uninterrupted one")


if __name__ == "__main__":
    main()

"""The command that the bundle's run.sh is."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from gpu_bundle.plan import STAGES
from gpu_bundle.runner import UNUSABLE, Runner

ROOT = Path(__file__).resolve().parents[2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.sh", description="Proves bnbops on this machine's GPU; writes a report.")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder to write to (%(default)s)")
    parser.add_argument("--minutes", type=minutes, default=8.0, help="all that it may take (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: the kernels run in a simulator")
    parser.add_argument(
        "--stages", nargs="+", choices=[stage.name for stage in STAGES], help="some only, the first one in any case"
    )
    return parser.parse_args()


def minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < 1e6:
            return value
    raise argparse.ArgumentTypeError(f"expected a positive number of minutes such as 8, got {text!r}")


def main() -> int:
    start, args = time.monotonic(), arguments()
    chosen = [stage for stage in STAGES if not args.stages or stage.name in ("environment", *args.stages)]
    out = args.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        runner = Runner(ROOT, out, chosen, 60 * args.minutes, args.dry_run, start=start)
    except OSError as error:
        print(f"cannot write to {args.out} ({error.strerror}): --out names another folder", file=sys.stderr)
        return UNUSABLE
    code = runner.run()
    if runner.record.ended:
        print(f"ended: {runner.record.ended}", file=sys.stderr)
    print(f"the report is in {args.out}: report.md, report.json")
    return code


if __name__ == "__main__":
    sys.exit(main())

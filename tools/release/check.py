"""`make wheels` and `make release-check`: docs/releasing.md.

`python -m release.check --wheels` builds the sdist and the wheel into dist/ and checks them. Without `--wheels` it
checks the version, the change log, the tag and the working tree first, and adds a bill of materials and checksums.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from release import ROOT, Fault, install, inventory, run, sdist, source, wheel


def say(what: str) -> None:
    print(f"ok: {what}", flush=True)


def check_source() -> tuple[str, bool]:
    """The version, and whether this is its release rather than a rehearsal.

    Raises:
        Fault: all that is wrong with the working tree, a line each.
    """
    version, faults, dated = source.version(), [], False

    def attempt(check: Callable[[], bool | None]) -> bool:
        try:
            return bool(check())
        except Fault as fault:
            faults.append(str(fault))
            return False

    attempt(lambda: source.check_tag(version))
    attempt(source.check_clean)
    dated = attempt(lambda: source.check_changelog(version, datetime.now(timezone.utc).date()))
    if faults:
        raise Fault("\n".join(faults))
    say(f"version {version}, its tag v{version} is free or this commit's, nothing is uncommitted")
    say(f"CHANGELOG.md has a section about it, {'with a date' if dated else 'unreleased: this is a rehearsal'}")
    return version, dated


def check_metadata(*archives: Path) -> None:
    """An index takes them: they say what they are, and the README renders."""
    run(sys.executable, "-m", "twine", "check", "--strict", *archives)


def make_archives(out: Path, version: str, torch: str) -> tuple[Path, Path]:
    """The sdist and the wheel built from it, in `out`, which is emptied before."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    archive = sdist.build(out)
    belongs = sdist.belongs()
    sdist.check(archive, belongs)
    say(f"{archive.name}, {archive.stat().st_size / 1e6:.2f} MB, has what is committed")
    built = wheel.build(archive, out)
    wheel.check_name(built, version)
    has_cuda = wheel.check_contents(built, belongs)
    wheel.check_libraries(built)
    kernels = "CPU and CUDA kernels" if has_cuda else "CPU kernels, none of CUDA"
    say(f"{built.name}, {built.stat().st_size / 1e6:.2f} MB, built from it: {kernels}")
    check_metadata(archive, built)
    say("an index takes their metadata (twine)")
    say(f"installed beside {torch}, without a compiler: {install.check(built, torch)}, all operators are right")
    return archive, built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder, which is emptied")
    parser.add_argument("--torch", default="torch", help="what the wheel is tried with, such as torch==2.13.0")
    parser.add_argument("--wheels", action="store_true", help="the archives alone")
    options = parser.parse_args()
    try:
        if options.wheels:
            make_archives(options.out.resolve(), source.version(), options.torch)
            return
        version, is_release = check_source()
        archive, built = make_archives(options.out.resolve(), version, options.torch)
        bill = inventory.write_bill(archive, built)
        inventory.check_bill(bill, archive, built)
        sums = inventory.write_sums([archive, built, bill])
        inventory.check_sums(sums)
        say(f"{bill.name}, {sums.name}")
    except Fault as fault:
        sys.exit(f"fault: {fault}")
    after = "tag it and publish dist/" if is_release else f"date {version} in CHANGELOG.md, and it can be released"
    print(f"everything is right; {after} (docs/releasing.md)")


if __name__ == "__main__":
    main()

"""Processes that leave nothing behind, however they or the runner end.

All processes of a run, children's children too, have an entry of their own in their environment, by which they are
found (/proc): no group, session or parent that they may have left is needed. A guard, in a session of its own, ends
them when the runner is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

MARK = "BNBOPS_GPU_REPORT_RUN"
_POLL_SECONDS = 0.1
_UNKILLABLE_SECONDS = 10.0  # a process within the driver dies late


class Run:
    """The processes of one run. As a context it ends with all of them gone."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Run:
        command = [sys.executable, "-B", __file__, self.mark]
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        return self

    def __exit__(self, *_: object) -> None:
        end_all(self.mark)
        assert self._guard is not None and self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()

    def watch(
        self, command: list[str], environment: dict[str, str], folder: Path, log: Path, over: Callable[[], str | None]
    ) -> str:
        """Runs a command to its end; says how it ended: "status 0", "SIGSEGV", or what `over`, which is asked all the
        time, said to end it for."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment | {MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        reason = None
        try:
            while process.poll() is None and reason is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
                reason = over() if process.returncode is None else None
        finally:
            end_all(self.mark)
            process.wait(_UNKILLABLE_SECONDS)
        return reason or ended(process.returncode)


def ended(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def marked(mark: str) -> list[int]:
    """Processes of the run that has this mark."""
    entry, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):  # another user's, or gone meanwhile
                if entry in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def alive(process: int) -> bool:
    """Whether there is such a process, and it is no mere entry that nobody has asked for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def end_all(mark: str) -> None:
    """Kills them until none is left; one that the driver does not let go is given up after a while."""
    give_up = time.monotonic() + _UNKILLABLE_SECONDS
    while (found := marked(mark)) and time.monotonic() < give_up:
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)


def guard(mark: str) -> None:
    """Waits until the runner closes its end of the pipe, which it does even if it is killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_all(mark)


if __name__ == "__main__":
    guard(sys.argv[1])

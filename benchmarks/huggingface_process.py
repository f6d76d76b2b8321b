"""A worker of huggingface.py as an object, whose calls are its methods."""

from __future__ import annotations

import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("huggingface_worker.py")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Process:
    """`peak` is the anonymous memory that the last call took at most, in bytes beyond what there was before it."""

    def __init__(self, library: str, python: str, log: Path) -> None:
        self.library, self._log, self.peak = library, log, 0
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [python, str(WORKER), library],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | OFFLINE,
            )

    def __getattr__(self, call: str) -> Any:
        if call.startswith("_"):
            raise AttributeError(call)
        return lambda **arguments: self._call(call, arguments)

    def _call(self, call: str, arguments: dict[str, Any]) -> Any:
        paths = {name: str(value) for name, value in arguments.items() if isinstance(value, Path)}
        before = self.peak = self._anonymous_memory()
        print(json.dumps({"call": call, **arguments, **paths}), file=self._process.stdin, flush=True)
        while not select.select([self._process.stdout], [], [], 0.002)[0]:
            self.peak = max(self.peak, self._anonymous_memory())
        self.peak -= before
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.library}'s process ended\n{self._log.read_text()[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.library}: {answer['error']}")
        return answer["result"]

    def _anonymous_memory(self) -> int:
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        return 0

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

"""What a compiled train step says when it cannot be one."""

from __future__ import annotations

import re

from torch._dynamo.exc import FailOnRecompileLimitHit

_ADVICE = """\
Nothing was run: parameters, optimizer state and gradients are unchanged. What to do:
  - print, log, save or plot after the call: return the tensors from the step function (they come back detached);
  - no Python decision on a tensor's value (`if loss > 3`, `error_if_nonfinite=True`): torch.where, or decide outside;
  - no module backward hooks, no GradScaler, no code that leaves torch (NumPy, C extensions without custom operators);
  - no fully_shard or DistributedDataParallel, which are hooks: bnbops.distributed.data_parallel takes their place;
  - to see whether the step itself is at fault, run it eagerly: torch.compiler.set_stance("force_eager").
docs/compile.md has the list. Dynamo's own report is the exception above this one."""


class GraphBreakError(RuntimeError):
    """The step function cannot be captured as one graph. Dynamo's exception is its ``__cause__``."""


class NothingTrainedError(RuntimeError):
    """A freshly compiled step ran and no parameter of some optimizer was updated."""


def explain(error: Exception, name: str) -> str:
    """Dynamo's report in three lines, and what to do about it."""
    if isinstance(error, FailOnRecompileLimitHit):
        return (
            f"{name}() was compiled too often (torch._dynamo.config.recompile_limit): something that is a constant of "
            "the graph differs from call to call. Batches of many shapes: pad them, or pass dynamic=True. A Python "
            "number or flag that the step reads: pass a tensor. TORCH_LOGS=recompiles names it."
        )
    report = str(error)
    what = [report.splitlines()[0]]
    if explanation := re.search(r"^\s*Explanation: (.+)$", report, re.MULTILINE):
        what.append(explanation[1])
    if raised := re.search(r"raised exception (.+)$", report, re.MULTILINE):
        what = [f"the code raised {_as_raised(raised[1])}"]
    if stack := getattr(error, "real_stack", None):
        what.append(f"at {stack[-1].filename}:{stack[-1].lineno}, in {stack[-1].name}: {stack[-1].line}")
    return f"{name}() cannot be compiled into one graph:\n  " + "\n  ".join(what) + f"\n{_ADVICE}"


def _as_raised(report: str) -> str:
    """Before torch 2.13: ValueError([ConstantVariable(str: 'no such batch')])."""
    if "([ConstantVariable(" not in report:
        return report
    arguments = re.sub(r"ConstantVariable\(\w+: (.*?)\)(?=, ConstantVariable|\]\)$)", r"\1", report)
    return arguments.replace("([", "(", 1).removesuffix("])") + ")"

"""Bad calls are refused with the CPU's words by the CUDA kernels as they ship, and by the fakes of CUDA tensors.

The kernels check before they ask anything of a device; here they get CPU tensors, past the dispatcher."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from bnbops._library import device_operators
from bnbops.testing.samples import operator, samples
from cases.rules import usual
from ops import test_bad_input, test_int8_bad_input
from ops.test_fakes import IN_DATA, SHARED, Outcome, bad_calls, fake_cuda, outcome, refused_for
from reference.group import op_options, random_group

NOT_BY_FAKES = (SHARED, "must be in [")  # they have no memory, and do not read rules' options
NO_DEVICE = "NVIDIA driver|CUDA driver|no CUDA-capable device"

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be given CPU memory: make test-gpu is for GPUs"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),  # by the spoiling itself
]


def shipped(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    """The operator's CUDA kernel, whatever tensors it gets."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return lambda *args, **kwargs: overload.redispatch(cuda, *args, **kwargs)


def fake_outcome(overload: torch._ops.OpOverload, arguments: dict[str, Any]) -> Outcome:
    """What the operator says of fake tensors on a GPU, but for those that are to be elsewhere, and `options`."""
    with FakeTensorMode() as mode:

        def fake(x: Tensor) -> Tensor:
            return fake_cuda(x) if x.device.type == "cpu" else mode.from_tensor(x)

        fakes = tree_map_only(Tensor, fake, arguments)
        return outcome(overload, fakes | {k: mode.from_tensor(v) for k, v in arguments.items() if k == "options"})


def check(overload: torch._ops.OpOverload, arguments: dict[str, Any], what: Any) -> str | None:
    """The words, if CPU, CUDA kernel and fake refuse alike; None if it is values that the CPU refuses, or nothing."""
    real = outcome(overload, arguments)
    if real[0] == "result" or refused_for(real, *IN_DATA, "no tensor arguments"):
        return None
    assert outcome(shipped(overload), arguments) == real, what
    if not refused_for(real, *NOT_BY_FAKES):
        assert fake_outcome(overload, arguments) == real, what
    return real[1]


@pytest.mark.parametrize("name", device_operators())
def test_random_bad_calls(name):
    refusals = {check(operator(name), arguments, wrong) for wrong, arguments, _ in bad_calls(name)} - {None}
    assert len(refusals) > 5


def step_cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    overload = operator("adam_step_")
    names = [argument.name for argument in overload._schema.arguments]
    for (bits, layout), case, change, _ in test_bad_input.STEP_CASES:
        group = random_group("adam", [(5, 300), (64,), (5, 300)], bits=bits, layout=layout)
        options = op_options(usual("adam"))
        change(group, options)
        yield "adam_step_", f"{bits} {layout} {case}", dict(zip(names, group.lists().values(), strict=False)) | options


def blockwise_cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for case, (changed, _) in test_bad_input.QUANTIZE_CASES.items():
        good = {"A": torch.linspace(-1, 1, 100), "code": test_bad_input.CODE.clone(), "blocksize": 64}
        yield "quantize_blockwise", case, good | changed
    for case, (changed, _) in test_bad_input.DEQUANTIZE_CASES.items():
        yield "dequantize_blockwise", case, test_bad_input.good_dequantize() | changed
    for case, (make, _) in test_bad_input.OUT_CASES.items():
        yield "dequantize_blockwise.out", case, test_bad_input.good_dequantize() | make("cpu")


def int8_cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for (name, argument, how), change in test_int8_bad_input.WRONG.items():
        good = test_int8_bad_input.GOOD[name]()
        yield name, f"{argument} {how}", good | {argument: change(good[argument])}


@pytest.mark.parametrize("cases", [step_cases, blockwise_cases, int8_cases], ids=lambda cases: cases.__name__)
def test_tables_of_bad_calls(cases):
    """Those of tests/ops/test_bad_input.py and tests/ops/test_int8_bad_input.py."""
    calls = list(cases())
    refused = [check(operator(name), arguments, (name, case)) for name, case, arguments in calls]
    assert len(refused) - refused.count(None) > 0.8 * len(calls)


@pytest.mark.parametrize("name", device_operators())
def test_good_calls_ask_for_a_device(name):
    """And say that there is none; only empty tensors need none."""
    answers = [outcome(shipped(operator(name)), sample.arguments(operator(name))) for sample in samples(name)]
    refusals = [words for kind, words in answers if kind == "refusal"]
    assert len(refusals) > len(answers) / 2
    assert [words for words in refusals if not re.search(NO_DEVICE, words)] == []


def test_without_a_device_torch_refuses_the_tensors():
    with pytest.raises(RuntimeError, match=NO_DEVICE):
        torch.empty(1, device="cuda")

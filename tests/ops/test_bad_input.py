"""Direct operator calls with nonsense: each raises, says which argument is wrong, and changes no byte.

The tables hold for every backend: a case changes good arguments that live on the device under test.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bnbops
from bnbops.functional import create_dynamic_map
from bnbops.versions import torch_is
from cases.rules import usual
from reference.group import Group, op_options, random_group

DEVICES = ["cpu", *(["cuda"] if bnbops.has_cuda and torch.cuda.is_available() else [])]
ERRORS = (RuntimeError, ValueError, TypeError)


def memory(values: object) -> list[Tensor]:
    """The whole storage, as bytes, of every tensor in nested arguments."""
    if isinstance(values, Tensor):
        if values.device.type == "meta":
            return []
        return [torch.empty(0, dtype=torch.uint8, device=values.device).set_(values.untyped_storage())]
    if isinstance(values, dict):
        values = list(values.values())
    return [part for value in values for part in memory(value)] if isinstance(values, list | tuple) else []


def check_refused(op: Callable, args: list, kwargs: dict, match: str) -> None:
    """`op` raises an error that matches, and every byte of its arguments is what it was."""
    storages = memory([args, kwargs])
    before = [storage.clone() for storage in storages]
    with pytest.raises(ERRORS, match=match):
        op(*args, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(before, storages, strict=True)), "a refused call changed a tensor"


# ---- adam_step_ ------------------------------------------------------------------------------------------------


def to_meta(x: Tensor) -> Tensor:
    return x.to("meta")


def widened(x: Tensor) -> Tensor:
    """The same values, with a gap behind each."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def swap(name: str, f: Callable[[Tensor], Tensor], i: int = 0) -> Callable[[Group, dict], None]:
    """Replaces tensor `i` of list `name` by `f` of it."""

    def change(group: Group, options: dict) -> None:
        tensors = group.lists()[name]
        tensors[i] = f(tensors[i])

    return change


def alias(name: str, other: str, i: int = 0, j: int = 0) -> Callable[[Group, dict], None]:
    """Makes tensor `i` of list `name` the very tensor `j` of list `other`."""

    def change(group: Group, options: dict) -> None:
        group.lists()[name][i] = group.lists()[other][j]

    return change


def drop(name: str) -> Callable[[Group, dict], None]:
    return lambda group, options: group.lists()[name].pop()


def clear(name: str) -> Callable[[Group, dict], None]:
    return lambda group, options: group.lists()[name].clear()


def option(name: str, value: object) -> Callable[[Group, dict], None]:
    return lambda group, options: options.update({name: value})


def number(name: str, *values: float, dtype: torch.dtype = torch.float32) -> Callable[[Group, dict], None]:
    """A tensor option: 0-dim for one value."""
    return option(name, torch.tensor(values[0] if len(values) == 1 else values, dtype=dtype))


def overlapping_grad(group: Group, options: dict) -> None:
    """A parameter and a gradient as views of one buffer, one element apart."""
    buffer = torch.zeros(1501, device=group.params[0].device)
    group.params[0], group.grads[0] = buffer[:1500].view(5, 300), buffer[1:].view(5, 300)


def mixed_layouts(group: Group, options: dict) -> None:
    scales = group.absmax["exp_avg_sq"]
    scales[0] = scales[0].new_zeros(6)


Change = Callable[[Group, dict], None]
LISTS = {
    "a gradient missing": (drop("grads"), "grads"),
    "a step missing": (drop("steps"), "steps"),
    "a parameter missing": (drop("params"), "params"),
    "a state missing": (drop("exp_avg_sq"), "exp_avg_sq"),
    "no states": (clear("exp_avg"), "exp_avg"),
}
SHAPES_AND_DTYPES = {
    "float64 parameter": (swap("params", Tensor.double), "params"),
    "integer parameter": (swap("params", Tensor.int), "params"),
    "float64 gradient": (swap("grads", Tensor.double), "grads"),
    "bf16 gradient of an fp32 parameter": (swap("grads", Tensor.bfloat16), "grads"),
    "integer gradient": (swap("grads", Tensor.int, 1), r"grads\[1\]"),
    "gradient of another shape": (swap("grads", Tensor.t), "grads"),
    "gradient of another rank": (swap("grads", Tensor.flatten), "grads"),
    "gradient to broadcast": (swap("grads", lambda g: g[:1]), "grads"),
    "half a state": (swap("exp_avg", lambda x: x[:2]), "exp_avg"),
    "float64 state": (swap("exp_avg_sq", Tensor.double), "exp_avg_sq"),
    "int8 state": (swap("exp_avg", lambda x: x.to(torch.int8), 1), r"exp_avg\[1\]"),
    "bf16 state": (swap("exp_avg", Tensor.bfloat16), "exp_avg"),
    "float64 step": (swap("steps", Tensor.double), "steps"),
    "integer step": (swap("steps", Tensor.long), "steps"),
    "two steps": (swap("steps", lambda x: x.repeat(2)), "steps"),
    "no step": (swap("steps", lambda x: x.repeat(0)), "steps"),
    "integer lr": (number("lr", 1, dtype=torch.int64), "lr"),
    "bf16 lr": (number("lr", 1.0, dtype=torch.bfloat16), "lr"),
    "two lr": (number("lr", 1.0, 2.0), "lr"),
    "empty lr": (option("lr", torch.zeros(0)), "lr"),
    "two scales": (number("grad_scale", 1.0, 2.0), "grad_scale"),
    "float64 scale": (number("grad_scale", 1.0, dtype=torch.float64), "grad_scale"),
    "two found_inf": (number("found_inf", 0.0, 0.0), "found_inf"),
    "boolean found_inf": (number("found_inf", 0, dtype=torch.bool), "found_inf"),
}
DEVICES_AND_STRIDES = {
    **{f"{name} on another device": (swap(name, to_meta, 1), name) for name in ("params", "grads", "exp_avg", "steps")},
    "first parameter on another device": (swap("params", to_meta), "params|device|meta"),
    "lr on another device": (option("lr", torch.tensor(1e-3, device="meta")), "lr"),
    "found_inf on another device": (option("found_inf", torch.zeros(1, device="meta")), "found_inf"),
    "transposed parameter": (swap("params", lambda x: x.t().contiguous().t()), "params.*contiguous"),
    "strided parameter": (swap("params", widened), "params.*contiguous"),
    "expanded parameter": (swap("params", lambda x: x[:1].expand(5, 300)), "params.*contiguous"),
    "strided state": (swap("exp_avg", widened), "exp_avg.*contiguous"),
    "transposed state": (swap("exp_avg_sq", lambda x: x.t().contiguous().t()), "exp_avg_sq.*contiguous"),
}
ALIASES = {
    "a parameter twice": (alias("params", "params", 2, 0), "share memory"),
    "the gradient is the parameter": (alias("grads", "params"), "share memory"),
    "the gradient overlaps the parameter": (overlapping_grad, "share memory"),
    "one tensor for both states": (alias("exp_avg_sq", "exp_avg"), "share memory"),
    "a state of two parameters": (alias("exp_avg", "exp_avg", 2, 0), "share memory"),
    "a step of two parameters": (alias("steps", "steps", 1, 0), "share memory"),
    "lr is a step": (lambda group, options: options.update(lr=group.steps[0]), "share memory"),
    "found_inf is a step": (lambda group, options: options.update(found_inf=group.steps[1]), "share memory"),
}
RANGES = {
    **{f"lr {x}": (number("lr", x, dtype=torch.float64), "lr") for x in (math.nan, math.inf, -math.inf)},
    **{f"{beta} {x}": (option(beta, x), beta) for beta in ("beta1", "beta2") for x in (math.nan, -0.1, 1.0, 1.5)},
    **{f"step {x}": (swap("steps", lambda t, x=x: t.fill_(x), 1), "steps") for x in (math.nan, math.inf, -1.0)},
    **{f"grad_scale {x}": (number("grad_scale", x), "grad_scale") for x in (math.nan, math.inf, 0.0, -2.0)},
    **{f"{name} {x}": (option(name, x), name) for name in ("eps", "weight_decay") for x in (math.nan, -1e-8, math.inf)},
}
EVERY_CODEC = LISTS | SHAPES_AND_DTYPES | DEVICES_AND_STRIDES | ALIASES | RANGES
EIGHT_BIT_ONLY = {
    "absmax missing": (drop("exp_avg_absmax"), "exp_avg_absmax"),
    "no absmax for one state": (clear("exp_avg_sq_absmax"), "exp_avg_sq_absmax"),
    "no absmax at all": (lambda g, o: [scales.clear() for scales in g.absmax.values()], "exp_avg|absmax"),
    "short absmax": (swap("exp_avg_absmax", lambda x: x[:-1]), "exp_avg_absmax"),
    "long absmax": (swap("exp_avg_sq_absmax", lambda x: torch.cat([x, x])), "exp_avg_sq_absmax"),
    "absmax of another rank": (swap("exp_avg_absmax", lambda x: x[None, None]), "exp_avg_absmax"),
    "float64 absmax": (swap("exp_avg_absmax", Tensor.double), "exp_avg_absmax"),
    "strided absmax": (swap("exp_avg_absmax", widened), "exp_avg_absmax.*contiguous"),
    "absmax on another device": (swap("exp_avg_absmax", to_meta, 1), "exp_avg_absmax"),
    "float codes": (swap("exp_avg", Tensor.float), "exp_avg"),
    "one absmax for both states": (alias("exp_avg_sq_absmax", "exp_avg_absmax"), "share memory"),
    "an absmax of two parameters": (alias("exp_avg_absmax", "exp_avg_absmax", 2, 0), "share memory"),
}
ROWS_ONLY = {
    "transposed absmax": (swap("exp_avg_absmax", lambda x: x.t().contiguous()), "exp_avg_absmax"),
    "one state by rows, one flat": (mixed_layouts, "layout"),
}
FP32_ONLY = {
    "fp32 states with absmax": (
        lambda g, o: [x.extend(torch.zeros(1) for _ in g.params) for x in g.absmax.values()],
        "exp_avg",
    ),
    "codes without absmax": (swap("exp_avg", Tensor.byte), "exp_avg"),
}
STEP_CASES = [
    (codec, name, *case)
    for codec, cases in {
        (32, "rows"): EVERY_CODEC | FP32_ONLY,
        (8, "rows"): EVERY_CODEC | EIGHT_BIT_ONLY | ROWS_ONLY,
        (8, "flat"): EVERY_CODEC | EIGHT_BIT_ONLY,
    }.items()
    for name, case in cases.items()
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: f"{case[0][0]}-{case[0][1]}-{case[1]}")
def test_adam_step_refuses(case, device):
    codec, _, change, match = case
    group = random_group("adam", [(5, 300), (64,), (5, 300)], bits=codec[0], layout=codec[1]).map(
        lambda x: x.to(device)
    )
    options = op_options(usual("adam"))
    change(group, options)
    check_refused(torch.ops.bnbops.adam_step_, list(group.lists().values()), options, match)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", [(32, "rows"), (8, "rows"), (8, "flat")], ids=str)
def test_the_cases_above_start_from_good_arguments(codec, device):
    group = random_group("adam", [(5, 300), (64,), (5, 300)], bits=codec[0], layout=codec[1]).map(
        lambda x: x.to(device)
    )
    torch.ops.bnbops.adam_step_(*group.lists().values(), **op_options(usual("adam")))
    assert group.steps[0].item() == 8


# ---- quantize_blockwise, dequantize_blockwise ------------------------------------------------------------------

CODE = create_dynamic_map()


def with_entry(value: float) -> Tensor:
    code = CODE.clone()
    code[100] = value
    return code


BAD_CODES = {
    "float64 code": (Tensor.double(CODE), "code"),
    "bf16 code": (CODE.bfloat16(), "code"),
    "short code": (CODE[:255], "code"),
    "4-bit code": (CODE[:16], "code"),
    "long code": (torch.cat([CODE, CODE[-1:]]), "code"),
    "2-dim code": (CODE.view(16, 16), "code"),
    "strided code": (widened(CODE), "code"),
    "code elsewhere": (CODE.to("meta"), "code"),
}
UNSORTED_CODES = {
    "descending code": (CODE.flip(0), "code.*(sorted|ascending)"),
    "code out of order": (with_entry(0.7), "code.*(sorted|ascending)"),
    "code with nan": (with_entry(math.nan), "code"),
}
BLOCKSIZES = {f"blocksize {x}": ({"blocksize": x}, "blocksize") for x in (0, -1, -256)}
NOT_VALUES = (torch.float64, torch.int32, torch.uint8, torch.bool)
QUANTIZE_CASES = {
    **{f"{dtype} values": ({"A": torch.zeros(100, dtype=dtype)}, "A") for dtype in NOT_VALUES},
    "values elsewhere": ({"A": torch.zeros(100, device="meta")}, "code|device|A"),
    **{name: ({"code": code}, match) for name, (code, match) in (BAD_CODES | UNSORTED_CODES).items()},
    **BLOCKSIZES,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", QUANTIZE_CASES)
def test_quantize_refuses(case, device):
    changed, match = QUANTIZE_CASES[case]
    good = {"A": torch.linspace(-1, 1, 100), "code": CODE.clone(), "blocksize": 64}
    torch.ops.bnbops.quantize_blockwise(**move(good, device))
    check_refused(torch.ops.bnbops.quantize_blockwise, [], move(good | changed, device), match)


def move(arguments: dict, device: str) -> dict:
    """Tensors to the device under test, but for those that are on the wrong one on purpose."""
    return {
        k: v.to(device) if isinstance(v, Tensor) and v.device.type != "meta" and v.is_contiguous() else v
        for k, v in arguments.items()
    }


CODES = torch.arange(100, dtype=torch.uint8)
DEQUANTIZE_CASES = {
    **{f"{dtype} codes": ({"A": CODES.to(dtype)}, "A") for dtype in (torch.int8, torch.int64, torch.float32)},
    **{name: ({"code": code}, match) for name, (code, match) in BAD_CODES.items()},
    **BLOCKSIZES,
    "short absmax": ({"absmax": torch.ones(1)}, "absmax"),
    "long absmax": ({"absmax": torch.ones(3)}, "absmax"),
    "no absmax": ({"absmax": torch.ones(0)}, "absmax"),
    "float64 absmax": ({"absmax": torch.ones(2, dtype=torch.float64)}, "absmax"),
    "bf16 absmax": ({"absmax": torch.ones(2, dtype=torch.bfloat16)}, "absmax"),
    "absmax elsewhere": ({"absmax": torch.ones(2, device="meta")}, "absmax|device|meta"),
    "larger blocks than absmax is for": ({"blocksize": 128}, "absmax"),
    "smaller blocks than absmax is for": ({"blocksize": 32}, "absmax"),
    **{f"to {dtype}": ({"dtype": dtype}, "dtype") for dtype in (torch.float64, torch.int32, torch.uint8)},
}


def good_dequantize() -> dict:
    return {"A": CODES.clone(), "absmax": torch.ones(2), "code": CODE.clone(), "blocksize": 64, "dtype": torch.float32}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", DEQUANTIZE_CASES)
def test_dequantize_refuses(case, device):
    changed, match = DEQUANTIZE_CASES[case]
    good = good_dequantize()
    torch.ops.bnbops.dequantize_blockwise(**move(good, device))
    check_refused(torch.ops.bnbops.dequantize_blockwise, [], move(good | changed, device), match)
    out = torch.full((100,), 7.0, device=device)
    check_refused(torch.ops.bnbops.dequantize_blockwise.out, [], move(good | changed, device) | {"out": out}, match)


def shared(**views: Callable[[Tensor], Tensor]) -> Callable[[str], dict]:
    """Arguments that are views of one buffer of 512 bytes."""

    def make(device: str) -> dict:
        buffer = torch.zeros(512, dtype=torch.uint8, device=device)
        return {name: view(buffer) for name, view in views.items()}

    return make


OUT_CASES = {
    "bf16 out": (lambda device: {"out": torch.zeros(100, dtype=torch.bfloat16, device=device)}, "out"),
    "uint8 out": (lambda device: {"out": torch.zeros(100, dtype=torch.uint8, device=device)}, "out"),
    "short out": (lambda device: {"out": torch.zeros(99, device=device)}, "out"),
    "long out": (lambda device: {"out": torch.zeros(101, device=device)}, "out"),
    "out of another rank": (lambda device: {"out": torch.zeros(10, 10, device=device)}, "out"),
    "out elsewhere": (lambda device: {"out": torch.zeros(100, device="meta")}, "out|device|meta"),
    "expanded out": (lambda device: {"out": torch.zeros(1, device=device).expand(100)}, "out|written-to"),
    "out over the codes": (shared(A=lambda b: b[:100], out=lambda b: b[:400].view(torch.float32)), "share memory"),
    "out over absmax": (
        shared(absmax=lambda b: b[400:408].view(torch.float32), out=lambda b: b[8:408].view(torch.float32)),
        "share memory",
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", OUT_CASES)
def test_dequantize_out_refuses(case, device):
    changed, match = OUT_CASES[case]
    good = good_dequantize() | {"out": torch.zeros(100)}
    torch.ops.bnbops.dequantize_blockwise.out(**move(good, device))
    check_refused(torch.ops.bnbops.dequantize_blockwise.out, [], move(good, device) | changed(device), match)


@pytest.mark.every_torch
def test_what_torch_refuses_is_said_in_its_words():
    """Where it tells them: a copy of what is expanded has no room in memory."""
    words = "can't allocate memory" if torch_is("2.13") else "failed; torch wrote why to stderr"
    with pytest.raises(RuntimeError, match=words) as raised:
        torch.ops.bnbops.quantize_blockwise(torch.zeros(1).expand(2**46), create_dynamic_map(), 256)
    assert ".h" not in str(raised.value), "nor where in a header it noticed"

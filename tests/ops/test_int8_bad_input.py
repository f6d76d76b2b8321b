"""Direct calls of the int8 operators with nonsense: each raises, says which argument is wrong, and changes no byte."""

import math

import pytest
import torch
from torch import Tensor

from cases import backends
from cases.int8 import activations, codes, ops, scales
from ops.test_bad_input import check_refused

pytestmark = backends.on_every_backend
INF, NAN = math.inf, math.nan
META = "meta"
GOOD = {
    "int8_vectorwise_quant": lambda: {"A": activations(3, 8), "threshold": 1.0},
    "int8_double_quant": lambda: {"A": activations(3, 8), "threshold": 1.0},
    "int8_vectorwise_dequant": lambda: {"A": codes(3, 8), "stats": scales(3)},
    "int8_linear_matmul": lambda: {"A": codes(3, 8), "B": codes(5, 8)},
    "int8_linear_matmul.out": lambda: {"A": codes(3, 8), "B": codes(5, 8), "out": torch.zeros(3, 5, dtype=torch.int32)},
    "int8_mm_dequant": lambda: {
        "A": torch.ones(3, 5, dtype=torch.int32),
        "row_stats": scales(3),
        "col_stats": scales(5),
        "bias": scales(5),
    },
    "int8_scaled_mm": lambda: {
        "A": codes(3, 8),
        "B": codes(5, 8),
        "row_stats": scales(3),
        "col_stats": scales(5),
        "bias": scales(5),
    },
    "linear_int8": lambda: {
        "x": activations(3, 8),
        "weight": codes(5, 8),
        "scale": scales(5),
        "bias": scales(5),
        "threshold": 1.0,
    },
    "linear_int8_weight_only": lambda: {
        "x": activations(3, 8),
        "weight": codes(5, 8),
        "scale": scales(5),
        "bias": scales(5),
    },
    "linear_int8_input_grad": lambda: {"grad": activations(3, 5), "weight": codes(5, 8), "scale": scales(5)},
}
ANY = {
    "scalar": lambda x: x.flatten()[0] if x.dim() > 1 else x[:0],
    "float64": Tensor.double,
    "int16": Tensor.short,
    "bool": Tensor.bool,
    "elsewhere": lambda x: x.to(META),
}
INT8 = {"uint8": lambda x: x.to(torch.uint8), "float32": Tensor.float, "int32": Tensor.int}
MATRIX = {
    "one column more": lambda x: torch.cat([x, x[:, :1]], dim=1),
    "flat": Tensor.flatten,
    "three dimensions": lambda x: x.unsqueeze(0),
}
STATS = {"float16": Tensor.half, "one element": lambda x: x[:1], "one more": lambda x: torch.cat([x, x[:1]])}
WRONG = {
    **{("int8_vectorwise_quant", "A", how): change for how, change in ANY.items() if how != "elsewhere"},
    **{("int8_double_quant", "A", how): change for how, change in ANY.items() if how != "elsewhere"},
    **{("int8_vectorwise_dequant", "A", how): change for how, change in (ANY | INT8).items()},
    **{("int8_vectorwise_dequant", "stats", how): change for how, change in (ANY | STATS).items()},
    **{("int8_linear_matmul", "A", how): change for how, change in (ANY | INT8).items()},
    **{("int8_linear_matmul", "B", how): change for how, change in (ANY | INT8 | MATRIX).items()},
    **{("int8_mm_dequant", "A", how): change for how, change in ANY.items()},
    **{("int8_scaled_mm", "B", how): change for how, change in (ANY | INT8 | MATRIX).items()},
    **{
        (op, stats, how): change
        for op in ("int8_mm_dequant", "int8_scaled_mm")
        for stats in ("row_stats", "col_stats")
        for how, change in (ANY | STATS).items()
    },
    **{
        (op, "bias", how): change
        for op in ("int8_mm_dequant", "int8_scaled_mm", "linear_int8", "linear_int8_weight_only")
        for how, change in {**ANY, "one more": STATS["one more"], "matrix": lambda x: x.view(1, -1)}.items()
    },
    **{
        (op, "x", how): change
        for op in ("linear_int8", "linear_int8_weight_only")
        for how, change in {**ANY, "one column less": lambda x: x[:, 1:]}.items()
        if how != "elsewhere"
    },
    ("linear_int8", "bias", "of another dtype"): Tensor.half,
    ("linear_int8_weight_only", "bias", "of another dtype"): Tensor.half,
    **{
        (op, "weight", how): change
        for op in ("linear_int8", "linear_int8_weight_only", "linear_int8_input_grad")
        for how, change in (ANY | INT8).items()
    },
    ("linear_int8", "weight", "one column more"): MATRIX["one column more"],
    **{
        (op, "weight", how): MATRIX[how]
        for op in ("linear_int8", "linear_int8_weight_only", "linear_int8_input_grad")
        for how in ("flat", "three dimensions")
    },
    **{
        (op, "scale", how): change
        for op in ("linear_int8", "linear_int8_weight_only", "linear_int8_input_grad")
        for how, change in (ANY | STATS).items()
    },
    **{("linear_int8_input_grad", "grad", how): change for how, change in ANY.items() if how != "elsewhere"},
    ("linear_int8_input_grad", "grad", "one column less"): lambda x: x[:, 1:],
    **{("int8_linear_matmul.out", "out", how): change for how, change in (ANY | MATRIX).items()},
    ("int8_linear_matmul.out", "out", "expanded"): lambda x: x[:1].expand(3, 5),
    ("int8_linear_matmul.out", "out", "transposed shape"): lambda x: x.t(),
}


def overload(name: str):
    packet, _, which = name.partition(".")
    return getattr(getattr(ops, packet), which or "default")


@pytest.mark.parametrize("case", WRONG, ids=" ".join)
def test_bad_tensors_are_refused(case):
    op, argument, _ = case
    arguments = GOOD[op]()
    overload(op)(**arguments)
    arguments = GOOD[op]()
    arguments[argument] = WRONG[case](arguments[argument])
    names = {"weight": "weight|x|grad", "B": "B|A", "A": "A|stats|B", "x": "x|weight", "grad": "grad|weight"}
    check_refused(overload(op), [], arguments, names.get(argument, argument))


@pytest.mark.parametrize("op", ["int8_vectorwise_quant", "int8_double_quant", "linear_int8"])
@pytest.mark.parametrize("threshold", [-1.0, -1e-30, NAN, -INF])
def test_bad_thresholds_are_refused(op, threshold):
    """With the same words for fake tensors."""
    message = rf"bnbops::{op}: threshold must be positive, or 0 for none, got {threshold:g}"
    arguments = GOOD[op]() | {"threshold": threshold}
    check_refused(overload(op), [], arguments, message)
    meta = {k: v.to(META) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    check_refused(overload(op), [], meta, message)


@pytest.mark.parametrize("op", ["int8_mm_dequant", "int8_scaled_mm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int8], ids=str)
def test_bad_dtypes_are_refused(op, dtype):
    check_refused(overload(op), [], GOOD[op]() | {"dtype": dtype}, f"{op}: dtype must be float32, bfloat16 or float16")


def test_an_out_over_an_operand_is_refused():
    memory = torch.zeros(400, dtype=torch.int8)
    A, B = memory[:24].view(3, 8), memory[32:72].view(5, 8)
    for begin in (0, 20, 68):
        out = memory[begin : begin + 60].view(torch.int32).view(3, 5)
        check_refused(ops.int8_linear_matmul.out, [A, B], {"out": out}, "share memory")
    ops.int8_linear_matmul.out(A, B, out=memory[72:132].view(torch.int32).view(3, 5))

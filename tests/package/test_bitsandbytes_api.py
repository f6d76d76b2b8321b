"""Every public name and signature of bitsandbytes, recorded by cases/bitsandbytes_api.py, has its counterpart here."""

import importlib
import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest

from bnbops.alias import finder
from cases.bitsandbytes_api import RECORD, Parameter, parameters_of, text_of

MODULES: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())["modules"]


def entries() -> Iterator[tuple[str, str]]:
    """What was recorded, under "module:name" and "module:class.member"; "module:class.()" is the constructor."""
    for module, names in MODULES.items():
        path = module.removeprefix(finder.NAME).removeprefix(".")
        if path.partition(".")[0] in finder.MISSING:
            continue
        for name, described in names.items():
            members = described if isinstance(described, dict) else {}
            yield f"{path}:{name}", "class" if members else described
            yield from ((f"{path}:{name}.{member}", text) for member, text in members.items() if member != "bases")


ENTRIES = dict(entries())


def keys(*patterns: str) -> list[str]:
    """The entries of these names, with their members."""
    listed = [[key for key in ENTRIES if f"{key}.".startswith(f"{pattern}.")] for pattern in patterns]
    assert all(listed), patterns
    return [key for found in listed for key in found]


_HANDLES = ("CUBLAS_Context", "GlobalPageManager", "elementwise_func", "fill", "get_paged", "get_ptr", "is_on_gpu")
_AUTOGRAD = [f"autograd._functions:{name}" for name in ("MatMul4Bit", "MatMul8bitFp", "MatMul8bitLt")]
_PARTS_OF_A_STEP = ("check_overrides", "fill_qmap", "get_config", "get_state_buffer", "prefetch_state")
_OVERRIDDEN = ("init_state", "update_step")
# What differs, and why. All else is a superset: further arguments come behind and have defaults.
DELIBERATE = {
    "there is no ctypes library, and no memory of its own": keys(
        *(f"functional:{name}" for name in (*_HANDLES, "prefetch_tensor"))
    ),
    "cuBLAS' products themselves: int8_linear_matmul serves": keys(
        *(f"functional:{name}" for name in ("batched_igemm", "check_matmul", "igemm"))
    ),
    "a cache that bitsandbytes' optimizers fill, and 127.0": keys("functional:name2qmap", "functional:C"),
    "studies of outliers, which no layer uses": keys(
        *("autograd._functions:GlobalOutlierPooler", "nn:OutlierAwareLinear", "nn.modules:OutlierAwareLinear"),
        *("utils:OutlierTracer", "utils:find_outlier_dims", "utils:outlier_hook"),
    ),
    "gradients are the operators' own; apply() is there": keys(
        *(f"{name}.{member}" for name in _AUTOGRAD for member in ("()", "forward", "backward"))
    ),
    "a step is one operator call for many parameters, and nothing in it can be overridden": keys(
        *(f"optim.optimizer:Optimizer8bit.{name}" for name in (*_PARTS_OF_A_STEP, *_OVERRIDDEN)),
        *(f"optim.optimizer:Optimizer{n}State.{name}" for n in (1, 2) for name in ("()", *_OVERRIDDEN)),
        *(f"optim.ademamix:AdEMAMix.{name}" for name in _OVERRIDDEN),
    ),
    "a forward changes nothing of a layer": keys("nn.modules:Linear4bit.set_compute_type"),
    "the layers' own hooks, for state dicts": keys(
        *("nn.modules:fix_4bit_weight_quant_state_from_module", "nn.modules:maybe_rearrange_weight"),
        "nn.modules:INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    ),
    "there need not be a GPU: by default the data stay where they are": keys("nn.modules:Params4bit.from_prequantized"),
    "it runs a command of the shell": keys("utils:execute_and_return"),
}


def counterpart(key: str) -> Any:
    """Raises AttributeError if there is none."""
    module, _, names = key.partition(":")
    value: Any = importlib.import_module(finder.ours(f"{finder.NAME}.{module}".removesuffix(".")))
    for name in names.split("."):
        if name != "()":
            value = inspect.getattr_static(value, name) if inspect.isclass(value) else getattr(value, name)
    return value


_NONE = Parameter("", "", "no such argument")


def misfit(theirs: list[Parameter], ours: list[Parameter]) -> str | None:
    """A way of calling theirs that ours does not take, or takes otherwise."""
    by_name = {parameter.name: parameter for parameter in ours}
    for i, parameter in enumerate(theirs):
        if parameter.kind == "positional" and ours[i : i + 1] != [parameter]:
            return f"argument {i} is not {parameter.name}, with the default {parameter.default}"
        if parameter.kind == "keyword" and by_name.get(parameter.name, _NONE).default != parameter.default:
            return f"no {parameter.name} with the default {parameter.default}"
        if parameter.kind in ("*", "**") and parameter.kind not in {mine.kind for mine in ours}:
            return f"no {parameter.kind}{parameter.name}"
    further = by_name.keys() - {parameter.name for parameter in theirs}
    needed = [n for n in further if by_name[n].kind in ("positional", "keyword") and by_name[n].default is None]
    return f"{needed} without a default" if needed else None


def difference(key: str) -> str | None:
    """What a user of bitsandbytes would miss."""
    recorded = ENTRIES[key]
    try:
        mine = counterpart(key)
    except AttributeError:
        return "missing"
    kind, bracket, signature = recorded.partition("(")
    if not bracket:
        return "no class" if recorded == "class" and not inspect.isclass(mine) else None
    if kind.strip() != (type(mine).__name__ if isinstance(mine, classmethod | staticmethod) else ""):
        return f"not a {kind.strip()}"
    function = mine.__func__ if isinstance(mine, classmethod | staticmethod) else mine
    return misfit(parameters_of(bracket + signature), parameters_of(text_of(function)))


def test_every_public_name_and_signature():
    differences = {key: what for key in ENTRIES if (what := difference(key)) is not None}
    known = {key for listed in DELIBERATE.values() for key in listed}
    assert {key: what for key, what in differences.items() if key not in known} == {}


@pytest.mark.parametrize("reason", DELIBERATE)
def test_deliberate_differences_are_still_there(reason):
    assert DELIBERATE[reason] != []
    classes = [key for key in DELIBERATE[reason] if ENTRIES[key] == "class"]
    members = {key for key in DELIBERATE[reason] if any(key.startswith(f"{name}.") for name in classes)}
    assert [key for key in DELIBERATE[reason] if key not in members and difference(key) is None] == []


def test_modules_that_are_missing_say_why():
    missing = [
        module for module in MODULES if module.removeprefix(f"{finder.NAME}.").partition(".")[0] in finder.MISSING
    ]
    assert {module.split(".")[1] for module in missing} >= finder.MISSING.keys() - {"backends"}


@pytest.mark.parametrize(
    ("theirs", "ours", "fits"),
    [
        ("(a, b=1)", "(a, b=1, c=2, *, d=3)", True),
        ("(a, b=1)", "(a, b=2)", False),
        ("(a, b=1)", "(b=1, a=None)", False),
        ("(a)", "(a, c)", False),
        ("(a, *, b=1)", "(a, *, c=1)", False),
        ("(a, *, b=1)", "(a, *, b=2)", False),
        ("(a, *, b=1)", "(a, b=1)", True),
        ("(a, **kw)", "(a)", False),
    ],
)
def test_misfits_are_noticed(theirs, ours, fits):
    assert (misfit(parameters_of(theirs), parameters_of(ours)) is None) == fits

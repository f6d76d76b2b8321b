"""Every operator of torch.ops.bnbops, found by asking the dispatcher, has all that an operator needs.

A new operator fails here until it has a schema with named arguments, a kernel, a fake, samples, a plain reference and
documentation.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import bnbops
from bnbops import facts
from bnbops.testing import self_check
from bnbops.testing.samples import SAMPLED, Sample, operator, samples
from cases import backends

DOCUMENTATION = (Path(__file__).parents[2] / "docs" / "operators.md").read_text()


def registered() -> list[str]:
    """All overloads, "op" or "op.overload", whoever registered them."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("bnbops::") for name in names if name.startswith("bnbops::"))


OPERATORS = registered()
CALLS = [pytest.param(name, i, id=f"{name}-{s.name}") for name in SAMPLED for i, s in enumerate(samples(name))]


# The halves of a step are documented with it.
OF_STEP = {half: rule.step for rule in facts.RULES.values() for half in (rule.direction, rule.apply)}


def operators_of(rule: facts.Rule) -> tuple[str, str, str]:
    return rule.step, rule.direction, rule.apply


# They take no tensor and give none: their kernels serve under fake tensors as well.
WITHOUT_FAKE = ("isa", "isas", "facts")


def has_kernel(name: str, *keys: str) -> bool:
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(f"bnbops::{name}", key) for key in keys)


def documented(name: str) -> bool:
    """A section of its own that begins with the registered schema and says all there is to say."""
    title = OF_STEP.get(name, name)
    section = re.search(rf"^## {re.escape(title)}\n\n```\n(.*?)(?=^## |\Z)", DOCUMENTATION, re.MULTILINE | re.DOTALL)
    schema = str(operator(name)._schema).removeprefix("bnbops::")
    needed = (f"{schema}\n", "**Arguments:**", "**Returns:**", "**Errors:**", "**Source:**")
    return section is not None and all(text in section[1] for text in needed)


def lacks(name: str) -> list[str]:
    """What an operator lacks."""
    arguments = operator(name)._schema.arguments
    everything = {
        "names for its arguments": not any(re.fullmatch(r"_?\d+|arg_?\d+|_\w*", a.name) for a in arguments),
        "CPU kernel": has_kernel(name, "CPU", "CompositeExplicitAutograd"),
        "fake kernel": has_kernel(name, "Meta") or name in WITHOUT_FAKE,
        "samples": name in SAMPLED and len(samples(name)) > 0,
        "reference": name in self_check.REFERENCES,
        "documentation": documented(name),
    }
    return [what for what, there in everything.items() if not there]


@pytest.mark.every_torch
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_complete(name):
    assert lacks(name) == []


def test_nothing_is_sampled_or_documented_that_does_not_exist():
    assert set(SAMPLED) == set(OPERATORS) == set(self_check.REFERENCES)
    assert sorted(re.findall(r"^## (\S+)$", DOCUMENTATION, re.MULTILINE)) == [
        name for name in OPERATORS if name not in OF_STEP
    ]


@pytest.mark.every_torch
@pytest.mark.parametrize("name", WITHOUT_FAKE)
def test_operators_without_fakes_need_none(name):
    schema = operator(name)._schema
    assert "Tensor" not in str(schema) and has_kernel(name, "CompositeExplicitAutograd")
    with FakeTensorMode():
        found = operator(name)()
    assert found == operator(name)()


def test_documented_kernels_are_those_there_are():
    """The CUDA library's as the simulator has them: from the same sources, without a CUDA compiler."""
    on_cuda = backends.simulated()
    there = {
        name: "any device"
        if has_kernel(name, "CompositeExplicitAutograd")
        else ", ".join(["CPU"] * has_kernel(name, "CPU") + ["CUDA"] * (name in on_cuda))
        for name in OPERATORS
    }
    assert dict(re.findall(r"^\| `(\S+)` \| ([^|]+) \|", DOCUMENTATION, re.MULTILINE)) == there


def test_documented_gradients_are_those_there_are():
    def differentiable(name: str) -> bool:
        outputs = tree_leaves([sample.clone().run(operator(name)) for sample in samples(name)])
        return any(isinstance(x, Tensor) and x.requires_grad for x in outputs)

    rows = re.findall(r"^\| `(\S+)` \| [^|]+ \| ([^|]+) \|", DOCUMENTATION, re.MULTILINE)
    assert {name: gradient.startswith("of ") for name, gradient in rows} == {n: differentiable(n) for n in OPERATORS}


def test_a_bare_operator_is_noticed():
    """This page's own test: an operator with a schema and nothing else lacks all the rest."""
    library = torch.library.Library("bnbops", "FRAGMENT")
    try:
        library.define("bare_(Tensor(a!) _0) -> ()")
        assert "bare_" in registered()
        everything = ["names for its arguments", "CPU kernel", "fake kernel", "samples", "reference", "documentation"]
        assert lacks("bare_") == everything
    finally:
        library._destroy()
    assert "bare_" not in registered()


@pytest.mark.parametrize("name", OPERATORS)
def test_samples_reach_every_argument(name):
    """Each optional argument is given in one sample and left out in another; names are distinct."""
    found = samples(name)
    assert len({sample.name for sample in found}) == len(found)
    for argument in operator(name)._schema.arguments:
        given = {argument.name in sample.arguments(operator(name)) for sample in found}
        assert given == ({True, False} if argument.has_default_value() else {True}), argument.name


@pytest.mark.every_torch
@pytest.mark.parametrize(("name", "i"), CALLS)
def test_agrees_with_the_plain_reference(name, i):
    assert self_check.check(name, samples(name)[i]) is None


# ---- the schema tells what is written --------------------------------------------------------------------------


def bits(value: Any) -> Any:
    """Values as bytes, to compare NaNs and signed zeros too."""
    return tree_map_only(Tensor, lambda x: x.detach().contiguous().view(-1).view(torch.uint8).tolist(), value)


def changed(name: str, sample: Sample) -> set[str]:
    """The arguments that a call changes."""
    overload, after = operator(name), sample.clone()
    after.run(overload)
    pairs = zip(sample.arguments(overload).items(), after.arguments(overload).values(), strict=True)
    return {argument for (argument, before), now in pairs if bits(before) != bits(now)}


def written(name: str) -> set[str]:
    """The arguments that the schema marks as written: Tensor(a!)."""
    arguments = operator(name)._schema.arguments
    return {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}


@pytest.mark.every_torch
@pytest.mark.parametrize("name", OPERATORS)
def test_marked_arguments_are_those_that_change(name):
    """opcheck notices none of this for lists of tensors."""
    changes = [changed(name, sample) for sample in samples(name)]
    assert set().union(*changes) == written(name)


@pytest.mark.parametrize("name", OPERATORS)
def test_marks_are_distinct(name):
    """One letter for two arguments would say that they are the same memory."""
    letters = re.findall(r"\((\w)!\)", str(operator(name)._schema))
    assert len(set(letters)) == len(letters) == len(written(name))


# ---- opcheck and the compiler ----------------------------------------------------------------------------------


# Rules whose operators are traced with every kind of sample: the others' schemas and fakes are made as theirs are, and
# each of them is in a graph of test_compile_family.py.
TRACED_RULES = {rule.trust: rule for rule in reversed(facts.RULES.values())}.values()
TRACED_ONCE = {op for rule in facts.RULES.values() if rule not in TRACED_RULES for op in operators_of(rule)}


def kind(name: str, sample: Sample) -> str:
    """All of a sample that tracing it can tell from another."""

    def described(x: Any) -> Any:
        tensor = isinstance(x, Tensor)
        return (x.dtype, x.dim(), x.is_contiguous(), x.requires_grad) if tensor else type(x)

    return repr(tree_map(described, sample.arguments(operator(name))))


def is_traced(name: str, i: int) -> bool:
    """Whether no sample before it is of its kind; the kind is most of the time that opcheck takes."""
    if name in TRACED_ONCE:
        return i == 0
    found = samples(name)
    return kind(name, found[i]) not in {kind(name, sample) for sample in found[:i]}


@pytest.mark.every_torch
@pytest.mark.parametrize(("name", "i"), CALLS)
def test_opcheck(name, i):
    sample, overload = samples(name)[i], operator(name)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(x.dtype == torch.float8_e4m3fn for x in tree_leaves((sample.args, sample.kwargs)) if isinstance(x, Tensor)):
        tests.remove("test_schema")  # torch (2.13) cannot compare such tensors; what changes is seen by the tests above
    if not is_traced(name, i):
        tests.remove("test_aot_dispatch_dynamic")
        torch.library.opcheck(overload, sample.args, sample.kwargs, test_utils=tests)
        return
    outputs = tree_leaves(sample.clone().run(overload))
    if not all(isinstance(x, Tensor) for x in outputs if x is not None):
        tests.remove("test_aot_dispatch_dynamic")  # it compares outputs as tensors; isa() returns a string
    elif any(x.requires_grad for x in tree_leaves((sample.args, sample.kwargs)) if isinstance(x, Tensor)) and not any(
        x.requires_grad for x in outputs
    ):
        # An operator without gradient: opcheck would differentiate all outputs because an input requires grad.
        tests.remove("test_aot_dispatch_dynamic")
        assert name in ("quantize_blockwise", "quantize_4bit", "dequantize_4bit")
        sample_without = sample.map(Tensor.detach)
        torch.library.opcheck(overload, sample_without.args, sample_without.kwargs)
    torch.library.opcheck(overload, sample.args, sample.kwargs, test_utils=tests)


def compilable(name: str, sample: Sample) -> bool:
    """Dynamo itself refuses a strided out=, of any operator."""
    return sample.kwargs.get("out", torch.empty(0)).is_contiguous()


MUTATING = [name for name in SAMPLED if written(name) and name not in TRACED_ONCE]


@pytest.mark.every_torch
@pytest.mark.parametrize("name", MUTATING)
def test_compiled_calls_write_the_same_bits(name):
    """opcheck compares outputs, and these have none: compare what they write, through functionalization. All samples
    in one graph."""
    overload = operator(name)
    chosen = [sample for sample in samples(name) if compilable(name, sample)]
    eager, compiled = ([sample.clone() for sample in chosen] for _ in range(2))
    for sample in eager:
        sample.run(overload)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(calls: list[tuple[Any, Any]]) -> None:
        for args, kwargs in calls:
            overload(*args, **kwargs)

    torch._dynamo.reset()
    call([(sample.args, sample.kwargs) for sample in compiled])
    for mine, its in zip(compiled, eager, strict=True):
        assert bits(mine.args) == bits(its.args) and bits(mine.kwargs) == bits(its.kwargs), mine.name


STRIDED_OUT = [call for call in CALLS if not compilable(call.values[0], samples(call.values[0])[call.values[1]])]


@pytest.mark.every_torch
@pytest.mark.parametrize(("name", "i"), STRIDED_OUT)
def test_strided_out_is_refused_by_dynamo(name, i):
    sample, overload = samples(name)[i], operator(name)
    call = torch.compile(lambda args, kwargs: overload(*args, **kwargs), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="non-contiguous `out=` tensor"):
        call(sample.args, sample.kwargs)


def test_the_package_lists_what_it_exports():
    assert all(hasattr(bnbops, name) for name in bnbops.__all__)

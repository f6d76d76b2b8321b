"""torch.ops.bitsandbytes while bnbops is installed as bitsandbytes: the schemas of 0.50.2, what it computed (recorded
in golden/operators.safetensors), and the compiler."""

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import bnbops
from bnbops import functional as F

SCHEMAS = """
dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor
dequantize_4bit.out(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, Tensor($0! -> ) out) -> ()
dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor
dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, Tensor($0! -> ) out) -> ()
gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor
gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor
gemv_4bit.out(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, Tensor($0! -> ) out) -> ()
int8_double_quant(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)
int8_linear_matmul(Tensor A, Tensor B) -> Tensor
int8_linear_matmul.out(Tensor A, Tensor B, Tensor($0! -> ) out) -> ()
int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, Tensor? bias=None) -> (Tensor, Tensor?)
int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor
int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None) -> Tensor
int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor
int8_vectorwise_quant(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor?)
optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) -> ()
optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()
quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)
quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)
""".strip().splitlines()  # noqa: E501
NAMES = [schema.partition("(")[0] for schema in SCHEMAS]
BETAS = (0.9, 0.99, 0.999, 5.0, 1e-4)  # beta1, beta2, beta3, alpha, eps
RULES = ("adam", "lamb", "momentum", "lars", "lion", "rmsprop", "adagrad", "ademamix")
MOST_EXACT = 2e-6  # some fp32 roundings of numbers around 1


@pytest.fixture
def ops() -> Iterator[torch._ops._OpNamespace]:
    bnbops.install_as_bitsandbytes()
    yield torch.ops.bitsandbytes
    bnbops.uninstall_as_bitsandbytes()


def overload(name: str) -> torch._ops.OpOverload:
    packet, _, which = name.partition(".")
    return getattr(getattr(torch.ops.bitsandbytes, packet), which or "default")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nf4() -> dict[str, Tensor]:
    """A weight [24, 64], doubly quantized, as `gemm_4bit` takes it, and as it is."""
    packed, state = F.quantize_4bit(normal(24, 64, seed=1), quant_type="nf4", compress_statistics=True)
    nested = {"absmax_8bit": state.absmax, "absmax_code": state.state2.code, "absmax_offset": state.offset}
    return {
        "packed": packed,
        "absmax": state.state2.absmax,
        "nested": nested,
        "values": F.dequantize_4bit(packed, state),
    }


# ---- there and gone --------------------------------------------------------------------------------------------


def test_schemas(ops):
    found = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("bitsandbytes::"))
    assert found == [f"bitsandbytes::{name}" for name in NAMES]
    assert [str(overload(name)._schema) for name in NAMES] == [f"bitsandbytes::{schema}" for schema in SCHEMAS]
    assert all(torch.Tag.pt2_compliant_tag in overload(name).tags for name in NAMES)


def test_they_go_and_come_again():
    """One that was kept says so; torch would end the process."""
    codes = torch.ones(2, 3, dtype=torch.int8)
    for _ in range(2):
        assert not hasattr(torch.ops.bitsandbytes, "gemm_4bit") and not hasattr(torch.ops.bitsandbytes, "gemv_4bit")
        bnbops.install_as_bitsandbytes()
        kept = [torch.ops.bitsandbytes.int8_linear_matmul, torch.ops.bitsandbytes.int8_linear_matmul.default]
        assert all(torch.equal(call(codes, codes), torch.full((2, 2), 3, dtype=torch.int32)) for call in kept)
        bnbops.uninstall_as_bitsandbytes()
        for call in kept:
            with pytest.raises(RuntimeError, match="int8_linear_matmul was bnbops', which is no longer installed"):
                call(codes, codes)


def test_operators_that_exist_stay():
    library = torch.library.Library("bitsandbytes", "FRAGMENT")
    library.define("gemm_4bit(Tensor x) -> Tensor")
    library.impl("gemm_4bit", lambda x: x + 1, "CompositeImplicitAutograd")
    try:
        with pytest.warns(UserWarning, match=r"torch\.ops\.bitsandbytes has operators already"):
            bnbops.install_as_bitsandbytes()
        assert torch.equal(torch.ops.bitsandbytes.gemm_4bit(torch.ones(2)), torch.full((2,), 2.0))
        assert not hasattr(torch.ops.bitsandbytes, "gemv_4bit")
        bnbops.uninstall_as_bitsandbytes()
        assert torch.equal(torch.ops.bitsandbytes.gemm_4bit(torch.ones(2)), torch.full((2,), 2.0))
    finally:
        library._destroy()


# ---- what bitsandbytes computed --------------------------------------------------------------------------------


def states(golden: dict[str, Tensor], rule: str) -> tuple[Tensor, Tensor | None]:
    m, v = golden["in.m"], golden["in.v"]
    first = torch.stack([m, m.flip(0)]) if rule == "ademamix" else v.clone() if rule in ("rmsprop", "adagrad") else m
    return first.clone(), v.clone() if rule in ("adam", "lamb", "ademamix") else None


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", ["32bit", "first", "bfloat16", "short"])
def test_optimizer_update_32bit(rule, case, golden, ops):
    """The third step and the first, a bf16 parameter, and max_unorm. bitsandbytes rounds elsewhere."""
    golden = golden("operators.safetensors")
    if case == "short" and f"{rule}.short.p" not in golden:
        with pytest.raises(ValueError, match=f"max_unorm must be 0 for {rule}"):
            state1, state2 = states(golden, rule)
            F.optimizer_update_32bit(
                rule, golden["in.g"], golden["in.p"], state1, 0.9, 1e-8, 1, 0.1, state2, max_unorm=1.0
            )
        return
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    max_unorm, step = 0.02 if case == "short" else 0.0, 1 if case == "first" else 3

    def run(update: Callable[..., None]) -> list[Tensor]:
        p, g, (state1, state2) = golden["in.p"].to(dtype, copy=True), golden["in.g"].to(dtype), states(golden, rule)
        unorm = torch.zeros(1)
        update(p, g, state1, state2, unorm)
        return [p, state1, *([] if state2 is None else [state2]), *([unorm] if max_unorm else [])]

    def by_operator(p: Tensor, g: Tensor, state1: Tensor, state2: Tensor | None, unorm: Tensor) -> None:
        norm = (unorm if max_unorm else None, max_unorm, golden["in.p"].norm().item())
        ops.optimizer_update_32bit(rule, g, p, state1, state2, *norm, *BETAS, 0.1, step, 0.01, 0.5)

    def by_function(p: Tensor, g: Tensor, state1: Tensor, state2: Tensor | None, unorm: Tensor) -> None:
        beta1, *others, eps = BETAS
        options = dict(zip(("beta2", "beta3", "alpha"), others, strict=True), weight_decay=0.1, gnorm_scale=0.5)
        options |= {"unorm_vec": unorm, "max_unorm": max_unorm}
        F.optimizer_update_32bit(rule, g, p, state1, beta1, eps, step, 0.01, state2, **options)

    names = ("p", "state1", "state2", "unorm") if rule in ("adam", "lamb", "ademamix") else ("p", "state1", "unorm")
    results = run(by_operator)
    for name, result in zip(names, results, strict=False):
        expected = golden[f"{rule}.{case}.{name}"]
        assert result.dtype == expected.dtype
        torch.testing.assert_close(
            result, expected, rtol=2**-8 if result.dtype == dtype != torch.float32 else 2e-6, atol=1e-7
        )
    assert all(map(torch.equal, run(by_function), results)) or case == "short"  # which measures the norm itself
    if case == "short":
        torch.testing.assert_close(run(by_function), results)


def coded(golden: dict[str, Tensor], rule: str) -> dict[str, Tensor | None]:
    """8-bit states and their maps, by the operator's names."""
    given = {
        name: golden.get(f"{rule}.8bit.{name}") for name in ("before1", "before2", "absmax_before1", "absmax_before2")
    }
    given = {name: None if x is None else x.clone() for name, x in given.items()}
    maps = {"qmap1": F.create_dynamic_map(), "qmap2": None if given["before2"] is None else F.create_dynamic_map(False)}
    return {
        **{"state1": given["before1"], "state2": given["before2"], **maps},
        **{"absmax1": given["absmax_before1"], "absmax2": given["absmax_before2"]},
    }


@pytest.mark.parametrize("rule", RULES)
def test_optimizer_update_8bit_blockwise(rule, golden, ops):
    golden = golden("operators.safetensors")
    p, tensors = golden["in.p"].clone(), coded(golden, rule)
    numbers = dict(zip(("beta1", "beta2", "beta3", "alpha", "eps"), BETAS, strict=True), step=3, lr=0.01)
    numbers |= {"weight_decay": 0.1, "gnorm_scale": 0.5}
    ops.optimizer_update_8bit_blockwise(rule, golden["in.g"], p, **tensors, **numbers)
    torch.testing.assert_close(p, golden[f"{rule}.8bit.p"], rtol=2e-6, atol=1e-7)
    for i in (1, 2):
        if tensors[f"state{i}"] is not None:
            torch.testing.assert_close(tensors[f"absmax{i}"], golden[f"{rule}.8bit.absmax{i}"])
            assert (tensors[f"state{i}"] != golden[f"{rule}.8bit.state{i}"]).sum() <= 2  # ties, within rounding


@pytest.mark.parametrize("rule", ["adam", "momentum", "lion", "ademamix"])
def test_skipped_and_scaled_gradients(rule, golden):
    """skip_zeros leaves those elements alone; gnorm_scale is a factor; strided parameters are written."""
    golden = golden("operators.safetensors")
    g = golden["in.g"].clone()
    g[1] = 0

    def step(g: Tensor, p: Tensor, **options: float) -> tuple[Tensor, Tensor, Tensor | None]:
        state1, state2 = states(golden, rule)
        F.optimizer_update_32bit(rule, g, p, state1, 0.9, 1e-4, 3, 0.01, state2, 0.99, 0.999, 5.0, 0.1, **options)
        return p, state1, state2

    p, *after = step(g, golden["in.p"].clone(), skip_zeros=True)
    q, *every = step(g, golden["in.p"].clone())
    before = [golden["in.p"], *states(golden, rule)]
    for now, then, other in zip((p, *after), before, (q, *every), strict=True):
        if now is not None:
            assert torch.equal(now[..., 1, :], then[..., 1, :]) and not torch.equal(other[..., 1, :], then[..., 1, :])
            assert torch.equal(now[..., [0, 2], :], other[..., [0, 2], :])
    assert torch.equal(step(4 * g, golden["in.p"].clone(), gnorm_scale=0.25)[0], q)
    strided = golden["in.p"].t().contiguous().t()
    assert torch.equal(step(g, strided)[0], q) and not strided.is_contiguous()


def test_products(golden, ops):
    golden = golden("operators.safetensors")
    A, W, bias = golden["in.A"], golden["in.W"], golden["in.bias"]
    packed, state = F.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    nested = (state.absmax, state.state2.code, state.offset.double())  # of any float dtype
    for B in (packed, packed.t()):
        y = ops.gemm_4bit(A, B, [24, 64], state.state2.absmax, 64, "nf4", bias, *nested)
        torch.testing.assert_close(y, golden["gemm_4bit"], rtol=1e-5, atol=1e-4)
    CA, SCA, columns = ops.int8_vectorwise_quant(A.half(), 6.0)
    CB, SCB, none = ops.int8_vectorwise_quant(W.half())
    assert none is None and torch.equal(columns, golden["mixed.cols"])
    y, sub = ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns, bias)
    # bitsandbytes' constant for 1 / 127^2 is off by 2e-5
    torch.testing.assert_close(y, golden["mixed.y"], rtol=3e-5, atol=3e-4)
    assert torch.equal(sub, golden["mixed.subA"])
    expected = golden["scaled_mm"]
    torch.testing.assert_close(
        ops.int8_scaled_mm(CA, CB, SCA, SCB, bias, torch.float32), expected, rtol=3e-5, atol=3e-4
    )
    without, empty = ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, None, bias)
    torch.testing.assert_close(without, expected, rtol=3e-5, atol=3e-4)
    assert empty.numel() == 0
    assert torch.equal(ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns[:0], bias)[0], without)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "af4"])
def test_gemv_multiplies_by_the_codes_given(name, ops):
    """Known types go to the kernels for them; others, and those on a device, are decoded by their values."""
    A, code = normal(2, 3, 64), F.get_4bit_type(name)
    packed, absmax = ops.quantize_4bit(normal(24, 64), 64, "nf4", torch.uint8)
    values = code[torch.stack([packed >> 4, packed & 15], 1).flatten().long()].view(24, 64) * absmax.view(24, 1)
    for B in (packed, packed.t(), packed.view(-1).view(torch.bfloat16).view(-1, 1)):
        y = ops.gemv_4bit(A, B, [24, 64], absmax, code, 64)
        torch.testing.assert_close(y, A @ values.t(), rtol=1e-5, atol=1e-4)
        out = torch.empty(2, 3, 24)
        ops.gemv_4bit.out(A, B, [24, 64], absmax, code, 64, out)
        assert torch.equal(out, y)


# ---- the compiler ----------------------------------------------------------------------------------------------


def samples() -> dict[str, tuple]:
    """Arguments of every operator."""
    A, weight, code = normal(5, 64), nf4(), F.create_dynamic_map()
    codes, stats, _ = F.int8_vectorwise_quant(A)
    columns, column_stats, _ = F.int8_vectorwise_quant(normal(24, 64, seed=1))
    packed, absmax = torch.ops.bnbops.quantize_4bit(A, 64, "fp4", torch.uint8)
    q, scales = torch.ops.bnbops.quantize_blockwise(A, code, 64)
    sums, fp4 = torch.ops.bnbops.int8_linear_matmul(codes, columns), F.get_4bit_type("fp4")
    p, state = (
        normal(4, 100),
        [torch.ops.bnbops.quantize_blockwise(normal(4, 100, seed=s).abs(), code, 256) for s in (1, 2)],
    )
    (state1, absmax1), (state2, absmax2) = state
    gemv = (A, packed, [5, 64], absmax, fp4, 64)
    return {
        "quantize_blockwise": (A, code, 64),
        "dequantize_blockwise": (q, scales, code, 64, torch.bfloat16),
        "dequantize_blockwise.out": (q, scales, code, 64, torch.float16, torch.empty(5, 64, dtype=torch.float16)),
        "quantize_4bit": (A, 64, "nf4", torch.uint8),
        "dequantize_4bit": (packed, absmax, 64, "fp4", [5, 64], torch.bfloat16),
        "dequantize_4bit.out": (packed, absmax, 64, "fp4", [5, 64], torch.float32, torch.empty(5, 64)),
        "gemm_4bit": (
            A,
            weight["packed"],
            [24, 64],
            weight["absmax"],
            64,
            "nf4",
            normal(24),
            *weight["nested"].values(),
        ),
        "gemv_4bit": gemv,
        "gemv_4bit.out": (*gemv, torch.empty(5, 5)),
        "int8_vectorwise_quant": (A, 2.0),
        "int8_double_quant": (A, 2.0),
        "int8_vectorwise_dequant": (codes, stats),
        "int8_linear_matmul": (codes, columns),
        "int8_linear_matmul.out": (codes, columns, torch.empty(5, 24, dtype=torch.int32)),
        "int8_mm_dequant": (sums, stats, column_stats, torch.float32, normal(24)),
        "int8_scaled_mm": (codes, columns, stats, column_stats, normal(24)),
        "int8_mixed_scaled_mm": (A, codes, columns, stats, column_stats, torch.tensor([3, 7]), normal(24)),
        "optimizer_update_32bit": (
            *("adam", normal(4, 100, seed=3), p, normal(4, 100, seed=1), normal(4, 100, seed=2).square()),
            *(torch.zeros(1), 0.5, 20.0, *BETAS, 0.1, 3, 0.01, 0.5, True),
        ),
        "optimizer_update_8bit_blockwise": (
            *("adam", normal(4, 100, seed=3), p, state1, state2, *BETAS, 3, 0.01),
            *(code, code.clone(), absmax1, absmax2, 0.1, 0.5),
        ),
    }


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, ops):
    torch.library.opcheck(overload(name), samples()[name])


@pytest.mark.parametrize("name", [name for name in NAMES if "4bit" in name or "optimizer" in name])
def test_one_graph(name, ops):
    """Compiled, each gives what it gives otherwise, and goes on when the name is gone, but for `gemv_4bit`: that looks
    at values, and so stays one operator in the graph. (opcheck compares all of them, without Dynamo.)"""
    torch.compiler.reset()
    call, counter = overload(name), CompileCounterWithBackend("aot_eager")
    expected, actual, later = (samples()[name] for _ in range(3))

    def run(*args: object) -> object:
        return call(*args)

    with torch.no_grad():
        compiled = torch.compile(run, backend=counter, fullgraph=True)
        results = call(*expected), compiled(*actual)
        torch.testing.assert_close(*results, rtol=0, atol=0)
        tensors = [[x for x in args if isinstance(x, Tensor)] for args in (actual, expected)]
        torch.testing.assert_close(*tensors, rtol=0, atol=0)  # what was written, too
        assert counter.frame_count == 1
        if not name.startswith("gemv"):
            bnbops.uninstall_as_bitsandbytes()
            torch.testing.assert_close(compiled(*later), results[0], rtol=0, atol=0)


def test_outliers_in_one_graph(ops):
    """LLM.int8 as bitsandbytes composes it: how many outlier columns there are, data decide."""
    torch.compiler.reset()
    weight, scales, _ = F.int8_vectorwise_quant(normal(24, 64, seed=1))

    def run(x: Tensor) -> Tensor:
        codes, stats, columns = ops.int8_vectorwise_quant(x, 2.5)
        return ops.int8_mixed_scaled_mm(x, codes, weight, stats, scales, columns)[0]

    counter = CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(run, backend=counter, fullgraph=True)
        for x in (normal(5, 64), normal(5, 64, seed=2), normal(5, 64) / 10):
            assert torch.equal(compiled(x), run(x))
    assert counter.frame_count == 1


def test_gradients(ops):
    """Of `gemm_4bit`, eager and compiled; bitsandbytes has them in its autograd function alone."""
    torch.compiler.reset()
    weight = nf4()

    def run(x: Tensor, bias: Tensor) -> Tensor:
        return ops.gemm_4bit(x, weight["packed"], [24, 64], weight["absmax"], 64, "nf4", bias, **weight["nested"])

    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        x, bias = normal(5, 64).requires_grad_(), normal(24).requires_grad_()
        actual = torch.autograd.grad(function(x, bias).tanh().sum(), (x, bias))
        expected = torch.autograd.grad((x @ weight["values"].t() + bias).tanh().sum(), (x, bias))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_export(ops):
    """A program that is decomposed holds bnbops' operators."""

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            packed, absmax = torch.ops.bitsandbytes.quantize_4bit(x, 64, "nf4", torch.uint8)
            return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", x.shape, x.dtype)

    program = torch.export.export(Layer(), (normal(5, 64),)).run_decompositions()
    assert "bitsandbytes" not in program.graph_module.code and "bnbops.dequantize_4bit" in program.graph_module.code
    assert torch.equal(program.module()(normal(5, 64)), Layer()(normal(5, 64)))


# ---- bad input -------------------------------------------------------------------------------------------------


def spoiled(name: str, argument: str, value: object) -> Callable[[], tuple[tuple, tuple]]:
    def make() -> tuple[tuple, tuple]:
        names = [a.name for a in overload(name)._schema.arguments]
        args = list(samples()[name])
        place = names.index(argument)
        args[place] = value(args[place]) if callable(value) else value
        return args, copy.deepcopy(args)

    return make


BAD = {
    ("optimizer_update_32bit", "optimizer_name", "adamw"): "optimizer_name must be one of adam, lamb, .*'adamw'",
    (
        "optimizer_update_32bit",
        "state1",
        lambda x: x[:3],
    ): r"states of adam must have shape p's, \[4, 100\]; got \[3, 100",
    ("optimizer_update_32bit", "state2", None): "adam needs a state2",
    ("optimizer_update_32bit", "g", lambda x: x[:3]): "same number of elements, got 300 and 400",
    ("optimizer_update_32bit", "state2", Tensor.half): "exp_avg_sq",
    ("optimizer_update_32bit", "beta1", 1.5): "beta1 must be in",
    ("optimizer_update_8bit_blockwise", "optimizer_name", "sgd"): "'sgd'",
    ("optimizer_update_8bit_blockwise", "qmap2", None): "adam needs qmap2 and absmax2",
    ("optimizer_update_8bit_blockwise", "absmax1", lambda x: x[:1]): "absmax has 1 elements",
    ("optimizer_update_8bit_blockwise", "qmap2", lambda x: x.flip(0)): "sorted|ascending",
    ("optimizer_update_8bit_blockwise", "state1", Tensor.int): "uint8",
    ("optimizer_update_8bit_blockwise", "lr", math.nan): "lr",
    ("gemm_4bit", "absmax_offset", None): "needs absmax_code and absmax_offset",
    ("gemm_4bit", "quant_type", "int5"): "int5",
    ("gemv_4bit.out", "out", lambda x: x[:3]): r"out must have shape \[5, 5\]",
    ("int8_linear_matmul.out", "out", Tensor.float): "int32",
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0]}-{case[1]}")
def test_bad_input_changes_nothing(case, ops):
    args, before = spoiled(*case)()
    with pytest.raises((ValueError, RuntimeError), match=BAD[case]):
        overload(case[0])(*args)
    for now, then in zip(args, before, strict=True):
        assert now is then or not isinstance(now, Tensor) or torch.equal(now.nan_to_num(), then.nan_to_num())


# ---- bitsandbytes' warnings and habits -------------------------------------------------------------------------


@pytest.mark.parametrize("installed", [False, True])
def test_float16_without_compute_dtype_is_said_to_be_slow(installed, caplog):
    """Once a layer, to the logger of bitsandbytes' module if that is what layers are said to be from."""

    def messages(layer: torch.nn.Module, *inputs: Tensor) -> list[str]:
        caplog.clear()
        for x in inputs:
            layer(x)
        assert {record.name for record in caplog.records} <= {type(layer).__module__}
        assert not installed or type(layer).__module__ == "bitsandbytes.nn.modules"
        return caplog.messages

    def layer(**options: torch.dtype) -> torch.nn.Module:
        return bnbops.nn.Linear4bit(64, 8, **options).to("cpu")

    if installed:
        bnbops.install_as_bitsandbytes()
    try:
        row, rows = normal(1, 64).half(), normal(2, 64).half()
        (message,) = messages(layer(), rows, rows)
        assert message.endswith("inference or training.")
        (message,) = messages(layer(), row, rows)
        assert message.endswith("inference.")
        assert not messages(layer(), row.float(), row.bfloat16())
        assert not messages(layer(compute_dtype=torch.float32), rows)
    finally:
        bnbops.uninstall_as_bitsandbytes()


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_forward_of_8_bits_casts_the_bias_for_good_as_bitsandbytes_does(kind):
    def layer() -> torch.nn.Linear:
        if kind == "4bit":
            return bnbops.nn.Linear4bit(64, 8).to("cpu")
        return bnbops.nn.Linear8bitLt(64, 8, has_fp16_weights=False).to("cpu")

    torch.manual_seed(0)
    with_name, without, x = layer(), layer(), normal(2, 64).half()
    without.load_state_dict(with_name.state_dict())
    bias, expected = with_name.bias, without(x)
    assert without.bias.dtype == torch.float32
    bnbops.install_as_bitsandbytes()
    try:
        with pytest.raises(RuntimeError):
            with_name(x[:, :-1])
        assert bias.dtype == torch.float32
        y = with_name(x)
    finally:
        bnbops.uninstall_as_bitsandbytes()
    kept = torch.float16 if kind == "8bit" else torch.float32  # 4-bit layers can be saved again to the same bytes
    assert with_name.bias is bias and bias.dtype == kept and bias.requires_grad
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert bias.grad.dtype == kept

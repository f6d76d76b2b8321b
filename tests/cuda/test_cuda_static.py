"""The machine code of the CUDA kernels, for four architectures: resources, wide accesses, rounding, length of loops.

What no GPU is needed for: nvcc compiles the kernels as the build does, nvdisasm shows what came out.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

from bnbops import facts
from cuda_on_cpu import library
from cuda_on_cpu.kernels import Kernels
from cuda_static import compiled, expected, gpu_model, sass

pytestmark = pytest.mark.skipif(
    bool(compiled.MISSING), reason=f"needs nvcc (the CUDA toolkit) and nvdisasm; missing: {compiled.MISSING}"
)

# Of a multiprocessor: shared memory and resident threads (CUDA programming guide, technical specifications).
SHARED_BYTES = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "sm_120": 100 << 10}
THREADS = {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}
REGISTERS = 1 << 16
PLANTED = Path(compiled.__file__).parent / "planted.cu"
RESERVED_BYTES = 1024  # of shared memory, for each thread block


@pytest.fixture(params=compiled.ARCHITECTURES)
def kernels(request) -> list[sass.Kernel]:
    """All kernels for one architecture."""
    return [kernel for (_, arch), kernel in gpu_model.kernels().items() if arch == request.param]


def has_no_local_memory(kernel: sass.Kernel) -> None:
    """Neither a stack nor spilled registers; what the compiler says, and what the instructions show."""
    assert kernel.stack_bytes == kernel.spilled_bytes == 0, kernel.name
    assert kernel.count("LDL") + kernel.count("STL") == 0, kernel.name


def has_its_thread_blocks_resident(kernel: sass.Kernel) -> None:
    """As many as __launch_bounds__ says, for which registers, shared memory and threads must suffice."""
    if kernel.template in expected.SMALL:
        return
    assert kernel.threads and kernel.resident, f"{kernel.name} has no __launch_bounds__(threads, resident)"
    registers = -(-kernel.registers // 8) * 8 * kernel.threads  # they are given out by eights
    assert kernel.resident * registers <= REGISTERS, kernel.name
    assert kernel.resident * (kernel.shared_bytes + RESERVED_BYTES) <= SHARED_BYTES[kernel.arch], kernel.name
    assert kernel.resident * kernel.threads <= THREADS[kernel.arch], kernel.name


def has_what_it_needs(kernel: sass.Kernel) -> None:
    """Wide accesses, tensor cores."""
    assert kernel.template in expected.NEEDED, f"{kernel.name}: say in expected.py what it needs"
    for prefix in expected.NEEDED[kernel.template]:
        assert kernel.count(prefix) > 0, f"{kernel.name}: no {prefix}"


def has_only_explicit_fused_operations(kernel: sass.Kernel) -> None:
    """A product and a sum of the source stay apart, as on the CPU. PTX tells: exact quotients and roots, which machine
    code makes of fused operations, are one instruction there."""
    explicit = re.compile(r"fused_multiply_add|__fma_rn\(|std::(exp|log)\(")  # the last: CUDA's own
    for line in kernel.fused:
        assert explicit.search(expected.source(*line)), f"{kernel.name}: {line}"


def has_exact_arithmetic(kernel: sass.Kernel) -> None:
    """Every operation is rounded to nearest and keeps denormals; ".rn" also has machine code keep products and sums
    apart."""
    operation = re.compile(r"\s((?:add|sub|mul|mad|fma|div|rcp|sqrt|rsqrt|ex2|lg2|sin|cos|tanh)\.[\w.]*f(?:32|64)\b)")
    exact = re.compile(r"\w+\.rn\.f(32|64)|rcp\.approx\.ftz\.f64")  # the latter: a first guess within CUDA's log
    inexact = Counter(op for op in operation.findall(kernel.ptx) if not exact.fullmatch(op))
    assert not inexact, f"{kernel.name}: {dict(inexact)}"


RULES = (
    has_no_local_memory,
    has_its_thread_blocks_resident,
    has_what_it_needs,
    has_only_explicit_fused_operations,
    has_exact_arithmetic,
)


def test_every_kernel_file_is_looked_at():
    text = (compiled.ROOT / "csrc" / "sources.cmake").read_text()
    files = re.search(r"set\(BNBOPS_CUDA_KERNELS ([^)]*)\)", text)[1].split()
    assert {file.rpartition("/")[2] for file in files} == {k.source for k in gpu_model.kernels().values()}


def test_the_simulator_runs_the_same_kernels(kernels):
    """Each instance of a template; tests/cuda/test_cuda_kernels.py shows that each of them runs."""
    simulated = Kernels(library.build()).names.values()
    assert sorted(simulated) == sorted(kernel.name for kernel in kernels)


def test_the_compiler_is_silent():
    for output in compiled.compile_all():
        assert "warning" not in output.log.lower(), output.log


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_kernel(rule, kernels):
    for kernel in kernels:
        rule(kernel)


@pytest.mark.parametrize("way", expected.WAYS, ids=lambda way: way.work)
def test_instructions_for_an_element(way, kernels):
    (kernel,) = [kernel for kernel in kernels if kernel.name == way.kernel]
    count = way.instructions(kernel)
    assert count <= way.most, f"{count:.1f} instructions"
    assert count > way.most / 2, f"{count:.1f} instructions: the bound should be lower"


def test_broken_rules_are_noticed():
    command = next(iter(compiled.commands().values()))
    planted = {k.name: k for k in sass.kernels(compiled.compile_for("sm_80", PLANTED, command))}
    broken = {
        "spilling_kernel": has_no_local_memory,
        "array_kernel": has_no_local_memory,
        "crowded_kernel": has_its_thread_blocks_resident,
        "unbounded_kernel": has_its_thread_blocks_resident,
        "quantize_kernel": has_what_it_needs,
        "unheard_of_kernel": has_what_it_needs,
        "contracted_kernel": has_only_explicit_fused_operations,
        "approximate_kernel": has_exact_arithmetic,
    }
    assert planted.keys() == broken.keys()
    for name, rule in broken.items():
        with pytest.raises(AssertionError, match=name):
            rule(planted[name])


def test_records_are_written_whole(kernels):
    """Padding too, which the compiler leaves out wherever it may: warps copy records by words."""
    written = {}
    for kernel in kernels:
        if kernel.template in ("prepare_kernel", "place_kernel"):
            stores = re.findall(r"st\.volatile\.global\.[ub]32\s+\[%rd\d+(?:\+(\d+))?\]", kernel.ptx)
            written[kernel.name] = sorted(int(at or 0) for at in stores)
    assert len(written) == len(facts.RULES) + 1
    for name, at in written.items():
        assert at and at == list(range(0, 4 * len(at), 4)) and len(at) % 2 == 0, name


def test_source_lines_do_not_change_the_code():
    """What is looked at is what is built: -lineinfo adds nothing but lines."""
    source, command = next(iter(compiled.commands().items()))
    plain, lines = (compiled.compile_for("sm_90", source, command, options) for options in ((), ("-lineinfo",)))
    assert not re.search("//## File", plain.sass)
    opcodes = [
        {kernel.name: [(i.guard, i.opcode, i.operands) for i in kernel.instructions] for kernel in sass.kernels(output)}
        for output in (plain, lines)
    ]
    assert opcodes[0] == opcodes[1]


def test_page_has_the_tables():
    """`python tests/cuda_static/gpu_model.py --write` renews them."""
    _, _, rest = gpu_model.PAGE.read_text().partition(gpu_model.BEGIN)
    assert rest.partition(gpu_model.END)[0] == gpu_model.tables()

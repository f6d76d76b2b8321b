"""Every instruction set gives the same bits, and those are right (reference/quantize.py).

`python test_isa.py` runs a seeded script and prints one hash per item; the tests run it once per instruction set.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bnbops
from bnbops import facts
from bnbops._library import ISAS
from bnbops.facts import FORMATS, ROLES
from bnbops.functional import create_dynamic_map, create_fp8_map, create_linear_map, get_4bit_type
from cases import int8
from cases.rules import CODECS, usual
from reference import quantize as ref
from reference.group import random_group
from reference.rules import RULES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MAPS = {
    "dynamic": create_dynamic_map(True),
    "dynamic-unsigned": create_dynamic_map(False),
    "linear": create_linear_map(),
    "fp8": create_fp8_map(),
}
SLACK = 10 * 2**-23  # see test_quantize.SLACK
TESTS = Path(__file__).parents[1]


def sweep(code: torch.Tensor, stride: int = 1021) -> torch.Tensor:
    """Every 1021st float in [-1, 1] (2 million), and every float within 64 ulp of a midpoint or an entry."""
    one = torch.tensor(1.0).view(torch.int32).item()
    evenly = torch.arange(0, one + 1, stride, dtype=torch.int32)
    targets = torch.cat([(code[1:].double() + code[:-1].double()).div(2).float().abs(), code.abs()]).view(torch.int32)
    near = (targets[:, None] + torch.arange(-64, 65, dtype=torch.int32)).flatten().clamp(0, one)
    magnitudes = torch.cat([evenly, near, torch.tensor([one], dtype=torch.int32)]).view(torch.float32)
    return torch.cat([magnitudes, -magnitudes])


def values(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Over many decades, with every kind of special value, some in blocks of their own."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator) * 10 ** (-6 * torch.rand(n, generator=generator))
    x[::1009], x[1::1013], x[2::2003], x[3::4001], x[4::503] = torch.inf, torch.nan, -torch.inf, -0.0, 1e-41
    x[-600:] *= 1e-41
    return x.to(dtype)


def items() -> Iterator[tuple[str, list[torch.Tensor]]]:
    """What the script computes: a name and the resulting tensors."""
    ops = torch.ops.bnbops
    for name, code in MAPS.items():
        yield f"sweep {name}", list(ops.quantize_blockwise(sweep(code), code, 1 << 40))
        for dtype in DTYPES:
            for blocksize in (64, 100, 256, 4096):
                codes, absmax = ops.quantize_blockwise(values(50_001, dtype), code, blocksize)
                decoded = [ops.dequantize_blockwise(codes, absmax, code, blocksize, to) for to in DTYPES]
                yield f"quantize {name} {dtype} {blocksize}", [codes, absmax, *decoded]
    for quant_type, format in FORMATS.items():
        x = sweep(get_4bit_type(quant_type).sort().values)
        yield f"sweep {quant_type}", list(ops.quantize_4bit(x, 4096, quant_type, torch.uint8))
        for dtype in DTYPES:
            for blocksize in (format.smallest_block, 64, 4096):
                yield f"{quant_type} {dtype} {blocksize}", there_and_back_4bit(quant_type, dtype, blocksize)
            yield f"{quant_type} {dtype}, large", [large_out_4bit(quant_type, dtype)]
    yield from int8.items()
    for codec in facts.CODECS.values():
        for role in ROLES.values():
            table = torch.tensor(codec.values(role)).nan_to_num(nan=1.0).sort().values
            yield f"{codec.name} {role.name}", coded_and_decoded(sweep(table), codec.name, role.name)
    for rule in RULES:
        for codec in CODECS if RULES[rule].states else ["fp32"]:
            for dtype in DTYPES:
                for grad_dtype in dict.fromkeys([dtype, torch.float32]):
                    yield f"{rule} {codec} {dtype} {grad_dtype}", steps_and_norms(rule, codec, dtype, grad_dtype)


def coded_and_decoded(x: torch.Tensor, codec: str, role: str) -> list[torch.Tensor]:
    """A state whose blocks all have the scale 1."""
    rows = torch.nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 255)
    codes, absmax = torch.ops.bnbops.encode_state(torch.cat([rows, torch.ones(len(rows), 1)], dim=1), codec, role)
    return [codes, absmax, torch.ops.bnbops.decode_state(codes, absmax, codec, role)]


def there_and_back_4bit(quant_type: str, dtype: torch.dtype, blocksize: int) -> list[torch.Tensor]:
    """Codes, scales, values in all dtypes, of single and double quantization, and rows of a table."""
    ops, shape = torch.ops.bnbops, [711, 71]
    packed, absmax = ops.quantize_4bit(values(711 * 71, dtype), blocksize, quant_type, torch.uint8)
    scales = absmax.clamp(max=1e3)
    codes, second = ops.quantize_blockwise(scales - scales.mean(), MAPS["dynamic"], 256)
    nested = {"nested_absmax": second, "nested_code": MAPS["dynamic"], "nested_offset": scales.mean()}
    described = (blocksize, quant_type, shape)
    decoded = [ops.dequantize_4bit(packed, absmax, *described, to) for to in DTYPES]
    decoded += [ops.dequantize_4bit(packed, codes, *described, to, **nested) for to in DTYPES]
    rows = torch.arange(0, 711, 7)
    return [packed, absmax, *decoded, ops.embedding_4bit(rows, packed, absmax, shape, blocksize, quant_type, dtype)]


def large_out_4bit(quant_type: str, dtype: torch.dtype) -> torch.Tensor:
    """As many values as are written past the caches, to memory that was used before."""
    rows = (8 << 20) // (dtype.itemsize * 4096) + 1
    packed, absmax = torch.ops.bnbops.quantize_4bit(values(4096, dtype), 64, quant_type, torch.uint8)
    many = packed.repeat(rows, 1), absmax.repeat(rows)
    out = torch.zeros(rows, 4096, dtype=dtype)
    torch.ops.bnbops.dequantize_4bit.out(*many, 64, quant_type, list(out.shape), dtype, out=out)
    return out


def steps_and_norms(rule: str, codec: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> list[torch.Tensor]:
    """Every tensor of a group after steps with different options, and the norms on the way."""
    ops = torch.ops.bnbops
    shapes = [(7, 300), (3, 255), (2, 513), (1, 1), (64, 64), (1000,), (5, 1), (2, 3, 129), (0, 4)]
    group = random_group(rule, shapes, **CODECS[codec], dtype=dtype, grad_dtype=grad_dtype, steps=(0, 3, 500))
    special = group.grads[0].view(-1)
    special[:6] = torch.tensor([torch.inf, torch.nan, 3e38, -3e38, 1e-41, -0.0]).to(grad_dtype)
    results = []
    for changed, maximize in (
        ({"nesterov": True, "dampening": 0.0, "t_alpha": 0, "t_beta3": 0}, False),
        ({"eps": 0.0, "weight_decay": 0.0, "adam_w_mode": False}, True),
        ({"lr": 0.1, "beta1": 0.5, "beta2": 0.9, "alpha": 0.7, "lr_decay": 0.3, "bias_correction": False}, False),
    ):
        options, clip = usual(rule, **changed), torch.linspace(0.3, 1, len(shapes))
        results.append(ops.squared_norms([*group.params, *group.grads]))
        results += group.half_steps(options, maximize=maximize, clip=clip) if maximize else []
        group.step(options, maximize=maximize, clip=clip)
    return results + [x for tensors in group.lists().values() for x in tensors]


def digest(tensors: list[torch.Tensor]) -> str:
    h = hashlib.sha256()
    for tensor in tensors:
        h.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def run(isa: str | None, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "BNBOPS_ISA"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    if isa is not None:
        environment["BNBOPS_ISA"] = isa
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hashes() -> dict[str, dict[str, str]]:
    """The script's output on every instruction set that this machine has."""
    best = run(None, "-c", "import bnbops; print(bnbops.isa())").stdout.strip()
    assert best in ISAS
    results = {}
    for isa in ISAS[: ISAS.index(best) + 1]:
        process = run(isa, __file__)
        assert process.returncode == 0, process.stderr
        results[isa] = json.loads(process.stdout)
        assert results[isa].pop("isa") == isa
    return results


def test_every_instruction_set_gives_the_same_bits(hashes):
    baseline = hashes["baseline"]
    assert len(baseline) > 60
    for isa, result in hashes.items():
        different = [name for name in baseline if baseline[name] != result[name]]
        assert not different, f"{isa} differs from baseline in: {different}"


@pytest.mark.parametrize("name", MAPS)
def test_millions_of_values_take_the_nearest_entry(name):
    """On this process' instruction set; the others have the same bits."""
    code = MAPS[name]
    x = sweep(code)
    codes, absmax = torch.ops.bnbops.quantize_blockwise(x, code, 1 << 40)
    assert absmax.item() == 1.0
    expected = ref.nearest_by_midpoints(x, code)
    differ = codes != expected
    ref.assert_nearest(x[differ], codes[differ], code, slack=SLACK * x[differ].abs())
    monotonic = code[codes.long()][x.argsort()]
    assert (monotonic.diff() >= 0).all()


def test_instruction_sets_are_those_of_the_dispatcher():
    source = (Path(__file__).parents[2] / "csrc" / "cpu" / "dispatch.cpp").read_text()
    assert tuple(reversed(re.findall(r'\{\{"(\w+)", &k', source))) == ISAS  # there the best comes first


@pytest.mark.parametrize("isa", ["avx1024", "AVX2"])
def test_unknown_instruction_set_is_refused_at_import(isa):
    process = run(isa, "-c", "import bnbops")
    assert process.returncode != 0
    assert "BNBOPS_ISA" in process.stderr and isa in process.stderr and "baseline" in process.stderr


def test_the_override_is_optional():
    assert run("", "-c", "import bnbops; print(bnbops.isa())").stdout.strip() in ISAS


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps({"isa": bnbops.isa()} | {name: digest(tensors) for name, tensors in items()}))


if __name__ == "__main__":
    main()
